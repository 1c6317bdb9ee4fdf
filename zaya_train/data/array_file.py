"""Flat arrays on disk, read by position.

Read, not mapped: mapped pages count as resident memory of every process that touches them, which
then grows with the corpus; what is read here is gone when the row is.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from zaya_train.config.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class ArrayFile:
    """`count` items of `dtype` from byte `offset_bytes` of a file on; safe to share by threads.

    Raises:
        DataError: the file cannot be opened.
    """

    def __init__(self, path: Path, dtype: Any, count: int, offset_bytes: int = 0) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.offset_bytes = offset_bytes
        self._count = count
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Items [start, stop), read-only.

        Raises:
            DataError: outside the array, or the file has become shorter.
        """
        if not 0 <= start <= stop <= self._count:
            raise DataError(f"{self.path}: items {start} to {stop} of {self._count}")
        size = (stop - start) * self.dtype.itemsize
        offset = self.offset_bytes + start * self.dtype.itemsize
        content = os.pread(self._descriptor, size, offset)
        while len(content) < size:
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                raise DataError(
                    f"{self.path}: offset {offset + len(content)}: end of file, {size} bytes "
                    f"expected from {offset} on"
                )
            content += more
        return np.frombuffer(content, dtype=self.dtype)

    def gather(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Items at scattered positions, through a mapping that ends with the call."""
        mapped = np.memmap(
            self.path, self.dtype, mode="r", offset=self.offset_bytes, shape=(self._count,)
        )
        return np.array(mapped[positions])
