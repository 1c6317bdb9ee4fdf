"""Files that appear under their name only when whole; the one door of this room to them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zaya_train.config.errors import StorageError
from zaya_train.data.storage import atomic_directory as whole_directory
from zaya_train.data.storage import file_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["file_sha256", "whole_directory", "whole_file"]


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; on success it takes the place of `target`.

    Raises:
        StorageError: the file system refused; what was there before still is.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error
