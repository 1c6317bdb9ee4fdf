"""A tokenised corpus on disk: megatron-core `.bin/.idx`, a section table, a manifest.

    tokens.bin, tokens.idx   documents, one sequence each, readable by Megatron-LM as they are
    sections.bin             SECTION_DTYPE rows of all documents, one after the other
    section_offsets.bin      int64 [documents + 1], rows of document i are offsets[i]:offsets[i+1]
    tokenizer/               tokenizer.json and tokenizer_config.json, loadable by AutoTokenizer
    continues.bin            uint8 [vocabulary], 1 for ids that begin inside a character
    manifest.json            format, counts, rejects by reason, sha256 of every other file

Written by `corpus_writer`; neither imports torch or megatron.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from zaya_train.config.errors import DataError
from zaya_train.data.array_file import ArrayFile
from zaya_train.data.sections import (
    SECTION_DTYPE,
    Sample,
    Sections,
    Tokens,
    text_sections,
)
from zaya_train.data.token_index import TokenIndex, open_index
from zaya_train.data.tokenizer import TemplateSource, Tokenizer, load_tokenizer, read_template
from zaya_train.runtime.files import file_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FORMAT_VERSION = 1
BIN, IDX, SECTIONS, OFFSETS = "tokens.bin", "tokens.idx", "sections.bin", "section_offsets.bin"
CONTINUES, TOKENIZER, MANIFEST = "continues.bin", "tokenizer", "manifest.json"

CorpusKind = Literal["text", "chat"]
Verify = Literal["sizes", "tokens", "hashes"]

_NO_CORPUS = "`zaya data prepare` makes corpora, `make smoke` those of recipe=smoke_cpu"
_SCAN_TOKENS = 1 << 22
_SCAN_DOCUMENTS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says; `files` maps relative path to {bytes, sha256}."""

    kind: CorpusKind
    vocab_size: int
    tokenizer_spec: str
    tokenizer_sha256: str
    pad_id: int
    end_id: int
    documents: int
    tokens: int
    supervised_tokens: int
    source: Mapping[str, Any]
    rejects: Mapping[str, int]
    files: Mapping[str, Mapping[str, Any]]
    format_version: int = FORMAT_VERSION

    @property
    def content_sha256(self) -> str:
        """Identity of what is trained on: tokens, document boundaries and sections, which an
        adopted corpus has none of."""
        names = (name for name in (BIN, IDX, SECTIONS, OFFSETS) if name in self.files)
        parts = (str(self.files[name]["sha256"]) for name in names)
        return hashlib.sha256("".join(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus opened for reading; of everything large only what is asked for is read."""

    path: Path
    manifest: Manifest
    index: TokenIndex = field(repr=False)
    token_file: ArrayFile = field(repr=False)
    section_file: ArrayFile | None = field(repr=False)
    """None for an adopted text corpus, whose documents are one section each."""
    section_offsets: ArrayFile | None = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, verify: Verify = "sizes") -> Corpus:
        """Open and check a corpus directory.

        Args:
            path: the directory.
            verify: `sizes` checks headers and file sizes; `tokens` also every token id against the
                vocabulary; `hashes` also every file against the manifest.

        Raises:
            DataError: not a corpus, or damaged; names the file and, where there is one, the offset.
        """
        path = Path(path)
        manifest = read_manifest(path)
        corpus = cls(path, manifest, *_open_tokens(path, manifest), *_open_sections(path, manifest))
        if verify == "hashes":
            _check_hashes(path, manifest)
        if verify in ("tokens", "hashes"):
            corpus.check_tokens()
        return corpus

    def __len__(self) -> int:
        return self.manifest.documents

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, [documents]."""
        return self.index.lengths

    @cached_property
    def supervised_tokens(self) -> NDArray[np.int64]:
        """Targets of every document, [documents]."""
        parts = []
        for first in range(0, len(self), _SCAN_DOCUMENTS):
            rows, counts = self.section_block(first, min(first + _SCAN_DOCUMENTS, len(self)))
            sizes = (rows["end"].astype(np.int64) - rows["start"]) * rows["supervised"]
            parts.append(np.bincount(np.repeat(np.arange(len(counts)), counts), sizes, len(counts)))
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    @cached_property
    def continues(self) -> NDArray[np.bool_]:
        """[vocabulary], True for ids that begin inside a character; see Tokenizer.continues."""
        file = self.path / CONTINUES
        if not file.is_file():
            return self.tokenizer.continues
        _check_size(file, self.manifest.vocab_size, f"{self.path / MANIFEST}")
        return np.fromfile(file, dtype=np.uint8).astype(bool)

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> Tokens:
        """Tokens [start, end) of a document, checked against the vocabulary.

        Raises:
            DataError: an id outside the vocabulary, with the file and the byte offset.
        """
        first, stop = self.index.spans(document, document + 1).tolist()
        last = stop if end is None else min(first + end, stop)
        ids = self.token_file.read(first + start, max(last, first + start))
        self._check_ids(ids, first + start)
        return ids

    def sections(self, document: int) -> Sections:
        """Section table of a document."""
        return self.section_block(document, document + 1)[0]

    def section_block(self, first: int, stop: int) -> tuple[Sections, NDArray[np.int64]]:
        """Section tables of documents first to stop - 1 end to end, and [n] rows of each."""
        if self.section_file is None or self.section_offsets is None:
            lengths = np.diff(self.index.spans(first, stop))
            return text_sections(lengths), np.ones_like(lengths)
        offsets = self.section_offsets.read(first, stop + 1)
        return self.section_file.read(int(offsets[0]), int(offsets[-1])), np.diff(offsets)

    def sample(self, document: int) -> Sample:
        """A whole document with its sections."""
        return Sample(self.tokens(document), self.sections(document), self.continues)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with."""
        return load_tokenizer(str(self.tokenizer_path))

    @cached_property
    def template(self) -> TemplateSource | None:
        """Chat template that its conversations are in; None of plain text."""
        return read_template(self.tokenizer_path) if self.manifest.kind == "chat" else None

    @property
    def tokenizer_path(self) -> Path:
        """Folder with tokenizer.json and tokenizer_config.json."""
        return self.path / TOKENIZER

    def check_tokens(self) -> None:
        """Compare every token id with the vocabulary; DataError names the first bad one."""
        total = len(self.token_file)
        for start in range(0, total, _SCAN_TOKENS):
            self._check_ids(self.token_file.read(start, min(start + _SCAN_TOKENS, total)), start)

    def _check_ids(self, ids: Tokens, position: int) -> None:
        vocab_size = self.manifest.vocab_size
        if not len(ids) or (int(ids.max()) < vocab_size and int(ids.min()) >= 0):
            return
        bad = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
        offset = (position + bad) * self.token_file.dtype.itemsize
        raise DataError(
            f"{self.path / BIN}: offset {offset}: token id {int(ids[bad])} outside the "
            f"vocabulary of {vocab_size}"
        )


def read_manifest(path: Path) -> Manifest:
    """The manifest of a corpus directory.

    Raises:
        DataError: missing, malformed or of another format version.
    """
    file = path / MANIFEST
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = ", ".join(sorted(str(found.parent) for found in path.glob(f"*/{MANIFEST}")))
        raise DataError(
            f"{path}: not a corpus directory: {MANIFEST} is missing; "
            + (f"it holds {inside}" if inside else _NO_CORPUS)
        ) from None
    except NotADirectoryError:
        raise DataError(f"{path}: not a directory") from None
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON: {error}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{file}: format version {version!r}, this program reads {FORMAT_VERSION}")
    try:
        return Manifest(**raw)
    except TypeError as error:
        raise DataError(f"{file}: {error}") from error


def _open_tokens(path: Path, manifest: Manifest) -> tuple[TokenIndex, ArrayFile]:
    index = open_index(path / IDX)
    _check_size(path / BIN, index.tokens * index.dtype.itemsize, f"{path / IDX}")
    counted = (len(index), index.tokens)
    if counted != (manifest.documents, manifest.tokens):
        raise DataError(
            f"{path / IDX}: holds {counted[0]} documents and {counted[1]} tokens, the manifest "
            f"says {manifest.documents} and {manifest.tokens}"
        )
    return index, ArrayFile(path / BIN, index.dtype, index.tokens)


def _open_sections(
    path: Path, manifest: Manifest
) -> tuple[ArrayFile, ArrayFile] | tuple[None, None]:
    if manifest.kind == "text" and SECTIONS not in manifest.files:
        return None, None
    _check_size(path / OFFSETS, 8 * (manifest.documents + 1), f"{path / MANIFEST}")
    offsets = ArrayFile(path / OFFSETS, "<i8", manifest.documents + 1)
    count = int(offsets.read(manifest.documents, manifest.documents + 1)[0])
    _check_size(path / SECTIONS, count * SECTION_DTYPE.itemsize, f"{path / OFFSETS}")
    return ArrayFile(path / SECTIONS, SECTION_DTYPE, count), offsets


def _check_size(file: Path, expected: int, according_to: str) -> None:
    if not file.is_file():
        raise DataError(f"{file}: missing")
    size = file.stat().st_size
    if size != expected or not size:
        raise DataError(f"{file}: {size} bytes, {expected} expected by {according_to}")


def _check_hashes(path: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        if not (path / name).is_file():
            raise DataError(f"{path / name}: missing")
        if file_sha256(path / name) != entry["sha256"]:
            raise DataError(f"{path / name}: content differs from the sha256 in {MANIFEST}")
