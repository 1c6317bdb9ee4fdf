"""Writes a tokenised corpus (see `corpus`) from blocks of documents, appended in order.

A block is what a worker process makes of some rows and what a finished shard holds on disk: raw
columns that a corpus file takes as they are.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zaya_train.config.errors import DataError
from zaya_train.data.corpus import (
    BIN,
    CONTINUES,
    IDX,
    MANIFEST,
    OFFSETS,
    SECTIONS,
    TOKENIZER,
    CorpusKind,
    Manifest,
)
from zaya_train.data.files import describe_files
from zaya_train.data.sections import SECTION_DTYPE, Rejected, Sample, Sections, Tokens
from zaya_train.data.token_index import token_dtype, write_index
from zaya_train.runtime.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from zaya_train.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Block:
    """Documents one after the other, and what was left out between them."""

    tokens: Tokens
    """Of all documents, in the type they are stored in."""
    lengths: NDArray[np.int64]
    """[documents] tokens of each."""
    sections: Sections
    """Section tables of all documents end to end."""
    section_counts: NDArray[np.int64]
    """[documents] sections of each."""
    rejects: Mapping[str, int]
    """Documents left out, by reason code."""


def make_block(samples: Iterable[Sample | Rejected], tokenizer: Tokenizer) -> Block:
    """Documents and rejected ones as a block.

    Raises:
        DataError: a token id outside the vocabulary.
    """
    kept: list[Sample] = []
    rejects: Counter[str] = Counter()
    for sample in samples:
        if isinstance(sample, Rejected):
            rejects[str(sample.reason)] += 1
            continue
        _check_ids(sample.tokens, tokenizer)
        kept.append(sample)
    dtype = token_dtype(tokenizer.vocab_size)
    return Block(
        tokens=_joined([sample.tokens for sample in kept], dtype),
        lengths=np.array([len(sample.tokens) for sample in kept], dtype=np.int64),
        # numpy's own way promotes the fields of every table anew.
        sections=np.frombuffer(b"".join(s.sections.tobytes() for s in kept), SECTION_DTYPE),
        section_counts=np.array([len(sample.sections) for sample in kept], dtype=np.int64),
        rejects=rejects,
    )


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a manifest says of a corpus's documents; fields as there."""

    kind: CorpusKind
    documents: int
    tokens: int
    supervised_tokens: int
    source: Mapping[str, Any]
    rejects: Mapping[str, int]


def write_manifest(folder: Path, tokenizer: Tokenizer, contents: Contents) -> None:
    """Complete a corpus whose tokens are there: its tokenizer's tables and the manifest."""
    (folder / CONTINUES).write_bytes(tokenizer.continues.tobytes())
    tokenizer.save(folder / TOKENIZER)
    manifest = Manifest(
        vocab_size=tokenizer.vocab_size,
        tokenizer_spec=tokenizer.spec,
        tokenizer_sha256=tokenizer.sha256,
        pad_id=tokenizer.pad_id,
        end_id=tokenizer.end_id,
        files=describe_files(folder),
        **vars(contents),
    )
    write_json(folder / MANIFEST, asdict(manifest))


class CorpusWriter:
    """Appends blocks to a corpus under construction; made by `fill_corpus`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, kind: CorpusKind) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._kind = kind
        self._dtype = token_dtype(tokenizer.vocab_size)
        with ExitStack() as files:
            self._bin = files.enter_context((folder / BIN).open("wb"))
            self._sections = files.enter_context((folder / SECTIONS).open("wb"))
            self._files = files.pop_all()
        self._lengths: list[NDArray[np.int64]] = []
        self._section_counts: list[NDArray[np.int64]] = []
        self._rejects: Counter[str] = Counter()
        self._supervised = 0

    @property
    def documents(self) -> int:
        """Documents appended so far."""
        return sum(len(lengths) for lengths in self._lengths)

    @property
    def rejects(self) -> dict[str, int]:
        """Rejected documents so far by reason code."""
        return dict(sorted(self._rejects.items()))

    def append(self, block: Block) -> None:
        """Append the documents of a block and count what it left out."""
        self._bin.write(block.tokens.astype(self._dtype, copy=False).tobytes())
        self._sections.write(block.sections.tobytes())
        self._lengths.append(block.lengths)
        self._section_counts.append(block.section_counts)
        self._rejects.update(block.rejects)
        sizes = block.sections["end"].astype(np.int64) - block.sections["start"]
        self._supervised += int(sizes[block.sections["supervised"].astype(bool)].sum())

    def finish(self, source: Mapping[str, Any]) -> None:
        """Write index, offsets and, last, the manifest."""
        self.close()
        lengths = np.concatenate([np.empty(0, np.int64), *self._lengths])
        counts = np.concatenate([[0], *self._section_counts])
        write_index(self._folder / IDX, self._dtype, lengths)
        (self._folder / OFFSETS).write_bytes(np.cumsum(counts).astype("<i8").tobytes())
        contents = Contents(
            kind=self._kind,
            documents=self.documents,
            tokens=int(lengths.sum()),
            supervised_tokens=self._supervised,
            source=dict(source),
            rejects=self.rejects,
        )
        write_manifest(self._folder, self._tokenizer, contents)

    def close(self) -> None:
        """Close the files of a corpus, finished or not; may be called again."""
        self._files.close()


@contextmanager
def fill_corpus(
    folder: Path, tokenizer: Tokenizer, kind: CorpusKind, source: Mapping[str, Any]
) -> Iterator[CorpusWriter]:
    """Write a corpus into `folder`, a directory that is being built and not yet in its place."""
    folder.mkdir(exist_ok=True)
    writer = CorpusWriter(folder, tokenizer, kind)
    try:
        yield writer
        writer.finish(source)
    finally:
        writer.close()


def _check_ids(ids: Tokens, tokenizer: Tokenizer) -> None:
    highest, lowest = int(ids.max()), int(ids.min())
    if highest < tokenizer.vocab_size and lowest >= 0:
        return
    bad = highest if highest >= tokenizer.vocab_size else lowest
    raise DataError(
        f"token id {bad} outside the vocabulary of {tokenizer.vocab_size} ({tokenizer.spec})"
    )


def _joined(parts: list[Any], dtype: np.dtype) -> Any:
    if not parts:
        return np.empty(0, dtype)
    return np.concatenate(parts).astype(dtype, copy=False)
