"""Rows of any input, each with the place it came from.

JSON Lines, JSON, plain text and folders of them are read here, so that a broken line can be named;
Parquet, Arrow and hub datasets come through `datasets`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import DataError, first_line
from zaya_train.runtime.files import file_sha256

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Row = dict[str, Any]
LocatedRow = tuple[str, Row]
"""(place such as `file:line`, row)."""

JSONL_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*JSONL_SUFFIXES, ".json", ".txt", ".parquet", ".arrow")
DEFAULT_DOCUMENT_CHARACTERS = 8192
"""Length of the pieces a text file is cut into when a held-out split is asked of it."""
_LEAST_SHARD_BYTES, _MOST_SHARD_BYTES, _SHARDS_PER_FILE = 1 << 20, 1 << 26, 256
_ROWS_PER_SHARD = 4096


@dataclass(frozen=True)
class LineShard:
    """Whole lines of a JSON Lines file, which whoever needs them reads."""

    file: Path
    start: int
    """First byte, as `stop` is the one after the last."""
    stop: int
    first_line: int

    def rows(self) -> Iterator[LocatedRow]:
        """The rows in order; DataError for a line that breaks the format."""
        return _jsonl_rows(self.file, self.start, self.stop, self.first_line)


@dataclass(frozen=True)
class RowShard:
    """Rows that have been read already, of formats that are read in one go."""

    read: tuple[LocatedRow, ...]

    def rows(self) -> Iterator[LocatedRow]:
        """The rows in order."""
        return iter(self.read)


Shard = LineShard | RowShard


@dataclass(frozen=True, kw_only=True)
class Input:
    """What to read: files of this machine, or a dataset of the hub.

    `document_characters` > 0 cuts `.txt` files at line ends into documents of about that length;
    0 makes each file one document.
    """

    spec: str
    split: str
    files: tuple[Path, ...]
    document_characters: int = 0

    def rows(self) -> Iterator[LocatedRow]:
        """All rows in order; may be called again.

        Raises:
            DataError: a file or line that breaks its format, with its place.
        """
        if not self.files:
            yield from _hub_rows(self.spec, self.split)
        for file in self.files:
            yield from self._file_rows(file)

    def shards(self) -> Iterator[Shard]:
        """All rows in order, in parts that follow from the input alone; may be called again.

        Raises:
            DataError: as `rows`, for formats other than JSON Lines.
        """
        if not self.files:
            yield from _row_shards(_hub_rows(self.spec, self.split))
        for file in self.files:
            if file.suffix.lower() in JSONL_SUFFIXES:
                yield from _line_shards(file)
            else:
                yield from _row_shards(self._file_rows(file))

    def identity(self) -> dict[str, Any]:
        """What tells this input from another: content hashes, or name and split on the hub."""
        if not self.files:
            return {"dataset": self.spec, "split": self.split}
        identity: dict[str, Any] = {}
        if any(file.suffix.lower() == ".txt" for file in self.files):
            identity["document_characters"] = self.document_characters
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
        names = [file.name for file in self.files]
        return identity | {"files": names, "sha256": digest.hexdigest()}

    def _file_rows(self, file: Path) -> Iterator[LocatedRow]:
        suffix = file.suffix.lower()
        if suffix in JSONL_SUFFIXES:
            return _jsonl_rows(file)
        if suffix == ".json":
            return _json_rows(file)
        if suffix == ".txt":
            return _text_rows(file, self.document_characters)
        return _table_rows(file)


def open_input(spec: str, split: str = "train", document_characters: int = 0) -> Input:
    """Find what `spec` names.

    Raises:
        DataError: a missing or empty file, an unknown kind of file, a folder without data files.
    """
    path = Path(spec)
    if path.is_dir():
        files = tuple(sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES))
        if not files:
            raise DataError(f"{path}: no data file ({', '.join(SUFFIXES)}) in this folder")
    elif path.is_file():
        files = (path,)
    elif path.suffix.lower() in SUFFIXES or spec.startswith((".", "/", "~")):
        raise DataError(f"{path}: no such file")
    else:
        files = ()
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise DataError(f"{file}: unknown kind of file; accepted: {', '.join(SUFFIXES)}")
        if not file.stat().st_size:
            raise DataError(f"{file}: empty file")
    return Input(spec=spec, split=split, files=files, document_characters=document_characters)


def _jsonl_rows(
    file: Path, start: int = 0, stop: int | None = None, first_line: int = 1
) -> Iterator[LocatedRow]:
    with file.open("rb") as stream:
        stream.seek(start)
        left = None if stop is None else stop - start
        for number, line in enumerate(stream, start=first_line):
            if line.strip():
                place = f"{file}:{number}"
                yield place, _object(_parse(line, place), place)
            if left is not None:
                left -= len(line)
                if left <= 0:
                    return


def _line_shards(file: Path) -> Iterator[LineShard]:
    """Parts of about equal size, cut at line ends."""
    share = file.stat().st_size // _SHARDS_PER_FILE
    size = min(max(share, _LEAST_SHARD_BYTES), _MOST_SHARD_BYTES)
    start, line = 0, 1
    with file.open("rb") as stream:
        while block := stream.read(size):
            lines = block.count(b"\n")
            if not block.endswith(b"\n"):
                rest = stream.readline()
                lines += rest.endswith(b"\n")
            stop = stream.tell()
            yield LineShard(file, start, stop, line)
            start, line = stop, line + lines


def _row_shards(rows: Iterable[LocatedRow]) -> Iterator[RowShard]:
    """Parts of bounded memory."""
    part: list[LocatedRow] = []
    characters = 0
    for place, row in rows:
        part.append((place, row))
        characters += _characters(row)
        if len(part) >= _ROWS_PER_SHARD or characters >= _LEAST_SHARD_BYTES:
            yield RowShard(tuple(part))
            part, characters = [], 0
    if part:
        yield RowShard(tuple(part))


def _characters(value: Any) -> int:
    """Of all text in a row."""
    if isinstance(value, dict):
        return sum(_characters(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_characters(item) for item in value)
    return len(value) if isinstance(value, str) else 0


def _json_rows(file: Path) -> Iterator[LocatedRow]:
    """A JSON array of objects; one object per line is accepted under this suffix too."""
    content = file.read_bytes()
    if not content.lstrip().startswith(b"["):
        yield from _jsonl_rows(file)
        return
    for number, row in enumerate(_parse(content, str(file))):
        place = f"{file}: element {number}"
        yield place, _object(row, place)


def _parse(content: bytes, place: str) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: not valid JSON: {error.msg} ({where})") from error


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON object is expected, found {type(row).__name__}")
    return row


def _text_rows(file: Path, document_characters: int) -> Iterator[LocatedRow]:
    try:
        with file.open(encoding="utf-8") as stream:
            lines: list[str] = []
            first, size = 1, 0
            for number, line in enumerate(stream, start=1):
                lines.append(line)
                size += len(line)
                if document_characters and size >= document_characters:
                    yield f"{file}:{first}", {"text": "".join(lines)}
                    lines, size, first = [], 0, number + 1
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start} of a block") from error
    if lines:
        yield f"{file}:{first}", {"text": "".join(lines)}


def _table_rows(file: Path) -> Iterator[LocatedRow]:
    # A second of import that JSON Lines and text do without.
    import datasets
    import pyarrow

    kind = file.suffix.lower().removeprefix(".")
    try:
        table = datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
        for number, row in enumerate(table):
            yield f"{file}: row {number}", dict(row)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{file}: cannot be read as {kind}: {first_line(error)}") from error


def _hub_rows(name: str, split: str) -> Iterator[LocatedRow]:
    import datasets

    try:
        table = datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name!r}: no such file, and no dataset of the hub with a split {split!r} "
            f"({first_line(error)})"
        ) from error
    for number, row in enumerate(table):
        yield f"{name}[{split}]: row {number}", dict(row)
