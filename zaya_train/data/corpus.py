"""A tokenised corpus on disk: megatron-core `.bin/.idx`, a section table, a manifest.

    tokens.bin, tokens.idx   documents, one sequence each, readable by Megatron-LM as they are
    sections.bin             SECTION_DTYPE rows of all documents, one after the other
    section_offsets.bin      int64 [documents + 1], rows of document i are offsets[i]:offsets[i+1]
    tokenizer/               tokenizer.json and tokenizer_config.json, loadable by AutoTokenizer
    manifest.json            format, counts, rejects by reason, sha256 of every other file

Reading maps the files and imports neither torch nor megatron; writing uses megatron-core's builder.
"""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from zaya_train.config.errors import DataError
from zaya_train.data.sections import SECTION_DTYPE, Rejected, Sample, Sections, Tokens
from zaya_train.data.tokenizer import Tokenizer, load_tokenizer
from zaya_train.runtime.files import file_sha256, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

FORMAT_VERSION = 1
BIN, IDX, SECTIONS, OFFSETS = "tokens.bin", "tokens.idx", "sections.bin", "section_offsets.bin"
TOKENIZER, MANIFEST = "tokenizer", "manifest.json"

CorpusKind = Literal["text", "chat"]
Verify = Literal["sizes", "tokens", "hashes"]

_IDX_MAGIC = b"MMIDIDX\x00\x00"
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SCAN_TOKENS = 1 << 22


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
        """Identity of what is trained on: tokens, document boundaries and sections."""
        parts = (str(self.files[name]["sha256"]) for name in (BIN, IDX, SECTIONS, OFFSETS))
        return hashlib.sha256("".join(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus opened for reading; everything large is memory-mapped."""

    path: Path
    manifest: Manifest
    token_map: NDArray[np.integer] = field(repr=False)
    token_offsets: NDArray[np.int64] = field(repr=False)
    section_map: Sections = field(repr=False)
    section_offsets: NDArray[np.int64] = field(repr=False)

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
        token_map, offsets = _open_tokens(path, manifest)
        section_map, section_offsets = _open_sections(path, manifest)
        corpus = cls(path, manifest, token_map, offsets, section_map, section_offsets)
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
        return np.diff(self.token_offsets)

    @cached_property
    def supervised_tokens(self) -> NDArray[np.int64]:
        """Targets of every document, [documents]."""
        rows = self.section_map
        counts = (rows["end"].astype(np.int64) - rows["start"]) * rows["supervised"]
        running = np.concatenate([[0], np.cumsum(counts)])
        return running[self.section_offsets[1:]] - running[self.section_offsets[:-1]]

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> Tokens:
        """Tokens [start, end) of a document, checked against the vocabulary.

        Raises:
            DataError: an id outside the vocabulary, with the file and the byte offset.
        """
        first, stop = self.token_offsets[document], self.token_offsets[document + 1]
        ids = self.token_map[first + start : stop if end is None else min(first + end, stop)]
        self._check_ids(ids, int(first) + start)
        return ids

    def sections(self, document: int) -> Sections:
        """Section table of a document."""
        return self.section_map[self.section_offsets[document] : self.section_offsets[document + 1]]

    def sample(self, document: int) -> Sample:
        """A whole document with its sections."""
        return Sample(self.tokens(document), self.sections(document))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with."""
        return load_tokenizer(str(self.tokenizer_path))

    @property
    def tokenizer_path(self) -> Path:
        """Folder with tokenizer.json and tokenizer_config.json."""
        return self.path / TOKENIZER

    def check_tokens(self) -> None:
        """Compare every token id with the vocabulary; DataError names the first bad one."""
        for start in range(0, len(self.token_map), _SCAN_TOKENS):
            self._check_ids(self.token_map[start : start + _SCAN_TOKENS], start)

    def _check_ids(self, ids: Tokens, position: int) -> None:
        vocab_size = self.manifest.vocab_size
        if not len(ids) or (int(ids.max()) < vocab_size and int(ids.min()) >= 0):
            return
        bad = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
        offset = (position + bad) * self.token_map.itemsize
        raise DataError(
            f"{self.path / BIN}: offset {offset}: token id {int(ids[bad])} outside the "
            f"vocabulary of {vocab_size}"
        )


class CorpusWriter:
    """Appends documents to a corpus under construction; made by `fill_corpus`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, kind: CorpusKind) -> None:
        # Seconds of import that only writing needs, with warnings about GPU libraries that it
        # does not.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._folder = folder
        self._tokenizer = tokenizer
        self._kind = kind
        self._dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._builder = IndexedDatasetBuilder(str(folder / BIN), dtype=self._dtype)
        self._sections = (folder / SECTIONS).open("wb")
        self._section_counts: list[int] = []
        self._rejects: Counter[str] = Counter()
        self._tokens = 0
        self._supervised = 0

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._section_counts)

    @property
    def rejects(self) -> dict[str, int]:
        """Rejected documents so far by reason code."""
        return dict(sorted(self._rejects.items()))

    def add(self, sample: Sample | Rejected) -> None:
        """Append a document, or count a rejected one.

        Raises:
            DataError: a token id outside the vocabulary.
        """
        if isinstance(sample, Rejected):
            self._rejects[str(sample.reason)] += 1
            return
        highest, lowest = int(sample.tokens.max()), int(sample.tokens.min())
        if highest >= self._tokenizer.vocab_size or lowest < 0:
            bad = highest if highest >= self._tokenizer.vocab_size else lowest
            raise DataError(
                f"document {self.documents}: token id {bad} outside the vocabulary of "
                f"{self._tokenizer.vocab_size} ({self._tokenizer.spec})"
            )
        self._builder.add_document(sample.tokens, [len(sample.tokens)])
        self._sections.write(sample.sections.tobytes())
        self._section_counts.append(len(sample.sections))
        self._tokens += len(sample.tokens)
        self._supervised += int(sample.supervised().sum())

    def extend(self, samples: Iterable[Sample | Rejected]) -> None:
        """`add` each."""
        for sample in samples:
            self.add(sample)

    def finish(self, source: Mapping[str, Any]) -> None:
        """Write index, offsets, tokenizer and, last, the manifest."""
        self._builder.finalize(str(self._folder / IDX))
        self._sections.close()
        offsets = np.concatenate([[0], np.cumsum(self._section_counts)]).astype("<i8")
        (self._folder / OFFSETS).write_bytes(offsets.tobytes())
        self._tokenizer.save(self._folder / TOKENIZER)
        manifest = Manifest(
            kind=self._kind,
            vocab_size=self._tokenizer.vocab_size,
            tokenizer_spec=self._tokenizer.spec,
            tokenizer_sha256=self._tokenizer.sha256,
            pad_id=self._tokenizer.pad_id,
            end_id=self._tokenizer.end_id,
            documents=self.documents,
            tokens=self._tokens,
            supervised_tokens=self._supervised,
            source=dict(source),
            rejects=self.rejects,
            files=_describe_files(self._folder),
        )
        write_json(self._folder / MANIFEST, asdict(manifest))

    def close(self) -> None:
        """Release the files of a corpus that is not finished."""
        self._builder.data_file.close()
        self._sections.close()


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


def read_manifest(path: Path) -> Manifest:
    """The manifest of a corpus directory.

    Raises:
        DataError: missing, malformed or of another format version.
    """
    file = path / MANIFEST
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: not a corpus directory: {MANIFEST} is missing") from None
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


def _open_tokens(path: Path, manifest: Manifest) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Token map and int64 [documents + 1] token offsets, from `.bin` and `.idx`."""
    dtype, lengths, document_ends = _read_index(path / IDX)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    offsets = starts[document_ends]
    _check_size(path / BIN, int(starts[-1]) * dtype.itemsize, f"{path / IDX}")
    counted = (len(offsets) - 1, int(offsets[-1]))
    if counted != (manifest.documents, manifest.tokens):
        raise DataError(
            f"{path / IDX}: holds {counted[0]} documents and {counted[1]} tokens, the manifest "
            f"says {manifest.documents} and {manifest.tokens}"
        )
    return np.memmap(path / BIN, dtype=dtype, mode="r"), offsets


def _read_index(file: Path) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64]]:
    """Token dtype, sequence lengths and document boundaries of a megatron-core index."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = stream.read(_IDX_HEADER.size)
    except FileNotFoundError:
        raise DataError(f"{file}: missing") from None
    if len(header) < _IDX_HEADER.size or not header.startswith(_IDX_MAGIC):
        raise DataError(f"{file}: offset 0: not a megatron-core index (bad magic)")
    _, version, code, sequences, boundaries = _IDX_HEADER.unpack(header)
    if version != 1 or code not in _IDX_DTYPES:
        raise DataError(f"{file}: offset 9: version {version} with token type {code}, 1 expected")
    expected = _IDX_HEADER.size + sequences * (4 + 8) + boundaries * 8
    if size != expected or not boundaries:
        raise DataError(
            f"{file}: {size} bytes, {expected} expected for {sequences} sequences and "
            f"{boundaries} boundaries: truncated or damaged"
        )
    content = np.memmap(file, dtype=np.uint8, mode="r", offset=_IDX_HEADER.size)
    lengths = content[: 4 * sequences].view("<i4")
    ends = content[12 * sequences :].view("<i8")
    if ends[0] != 0 or ends[-1] != sequences or (len(lengths) and lengths.min() < 0):
        raise DataError(f"{file}: document boundaries or lengths are damaged")
    return np.dtype(_IDX_DTYPES[code]), lengths, ends


def _open_sections(path: Path, manifest: Manifest) -> tuple[Sections, NDArray[np.int64]]:
    _check_size(path / OFFSETS, 8 * (manifest.documents + 1), f"{path / MANIFEST}")
    offsets = np.memmap(path / OFFSETS, dtype="<i8", mode="r")
    size = int(offsets[-1]) * SECTION_DTYPE.itemsize
    _check_size(path / SECTIONS, size, f"{path / OFFSETS}")
    return np.memmap(path / SECTIONS, dtype=SECTION_DTYPE, mode="r"), offsets


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


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        for file in files
    }
