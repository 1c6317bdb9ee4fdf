"""A megatron-core `.idx`: where every document's tokens lie in its `.bin`.

Written here as megatron-core's IndexedDatasetBuilder writes it, byte for byte; that one costs five
seconds of import in every process.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from zaya_train.config.errors import DataError
from zaya_train.data.array_file import ArrayFile

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SMALL_VOCABULARY = 65_500
"""Below it megatron-core stores ids in two bytes (DType.optimal_dtype)."""


@dataclass(frozen=True, eq=False)
class TokenIndex:
    """An index opened for reading; made by `open_index`."""

    path: Path
    dtype: np.dtype
    sequence_lengths: ArrayFile
    pointers: ArrayFile
    """First byte of every sequence."""
    boundaries: ArrayFile
    """[documents + 1] first sequence of every document, the number of sequences last."""
    tokens: int
    """In all documents."""

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    def spans(self, first: int, stop: int) -> NDArray[np.int64]:
        """[stop - first + 1] token offsets: where documents first to stop - 1 begin, and the end.

        Raises:
            DataError: they do not follow one another inside the `.bin`.
        """
        sequences = self.boundaries.read(first, stop + 1)
        low, high = int(sequences.min()), int(sequences.max())
        if low < 0 or high > len(self.pointers):
            raise self._damaged(first)
        starts = self.pointers.read(low, min(high + 1, len(self.pointers))) // self.dtype.itemsize
        if high == len(self.pointers):
            starts = np.append(starts, self.tokens)
        offsets = starts[sequences - low].astype(np.int64)
        if offsets[0] < 0 or offsets[-1] > self.tokens or (np.diff(offsets) < 0).any():
            raise self._damaged(first)
        return offsets

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, [documents]."""
        return np.diff(self.spans(0, len(self)))

    def _damaged(self, first: int) -> DataError:
        return DataError(
            f"{self.path}: document boundaries or lengths are damaged, from document {first} on"
        )


def open_index(file: Path) -> TokenIndex:
    """Open an index and check its size and its ends.

    Raises:
        DataError: no index, truncated or damaged; with the file and the offset.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = stream.read(_HEADER.size)
    except FileNotFoundError:
        raise DataError(f"{file}: missing") from None
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{file}: offset 0: not a megatron-core index (bad magic)")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{file}: offset 9: version {version} with token type {code}, 1 expected")
    expected = _HEADER.size + sequences * (4 + 8) + boundaries * 8
    # Multimodal indices end in one more byte per sequence.
    if size not in (expected, expected + sequences) or not boundaries:
        raise DataError(
            f"{file}: {size} bytes, {expected} expected for {sequences} sequences and "
            f"{boundaries} boundaries: truncated or damaged"
        )
    dtype = np.dtype(_DTYPES[code])
    after_lengths = _HEADER.size + 4 * sequences
    lengths = ArrayFile(file, "<i4", sequences, _HEADER.size)
    pointers = ArrayFile(file, "<i8", sequences, after_lengths)
    ends = ArrayFile(file, "<i8", boundaries, after_lengths + 8 * sequences)
    tokens = 0
    if sequences:
        last = int(lengths.read(sequences - 1, sequences)[0])
        tokens = int(pointers.read(sequences - 1, sequences)[0]) // dtype.itemsize + last
    first, stop = int(ends.read(0, 1)[0]), int(ends.read(boundaries - 1, boundaries)[0])
    if first != 0 or stop != sequences or tokens < 0:
        raise DataError(f"{file}: document boundaries or lengths are damaged")
    return TokenIndex(file, dtype, lengths, pointers, ends, tokens)


def token_dtype(vocab_size: int) -> np.dtype:
    """How megatron-core stores ids of such a vocabulary."""
    return np.dtype("<u2" if vocab_size < _SMALL_VOCABULARY else "<i4")


def write_index(file: Path, dtype: np.dtype, lengths: NDArray[np.int64]) -> None:
    """Write the index of documents of one sequence each that follow one another in their `.bin`.

    Args:
        file: where to.
        dtype: of the tokens, as `token_dtype` says.
        lengths: [documents] tokens of each.
    """
    code = next(code for code, name in _DTYPES.items() if np.dtype(name) == dtype)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    pointers = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    with file.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write(pointers.astype("<i8").tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
