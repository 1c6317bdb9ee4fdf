"""Writing whole things or nothing: a directory appears under its name only when complete."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_train.config.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HASH_BLOCK_BYTES = 1 << 22


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target`; on success it takes the place of `target`.

    Everything below it is flushed to disk before the rename. After an error or an interrupt the
    temporary directory is gone and `target` is as it was; after a kill a `.tmp-*` remains.

    Raises:
        StorageError: the file system refused a write (full disk, permission).
    """
    parent = target.absolute().parent
    temporary = parent / f".tmp-{target.name}-{uuid.uuid4().hex[:12]}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if temporary.exists():
            _sync_tree(temporary)
            _replace(temporary, target)
            _sync_path(parent)
    except OSError as error:
        if not _is_storage(error):
            raise
        raise storage_error(error, target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(folder: Path) -> None:
    """Inside `atomic_directory`: give up the directory and leave its target as it is."""
    shutil.rmtree(folder)


def storage_error(error: OSError, target: Path) -> StorageError:
    """The one-line form of a file-system refusal while writing `target`."""
    place = error.filename or target
    return StorageError(f"{target}: not written: {place}: {error.strerror or error}")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _is_storage(error: OSError) -> bool:
    """Errors of the device or its rights, as opposed to an input file that is missing."""
    return error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EEXIST,
    )


def _replace(temporary: Path, target: Path) -> None:
    """Rename over `target`; an existing one is moved aside first and removed last."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = temporary.with_name(temporary.name + ".old")
    target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync_path(Path(root, name))
        _sync_path(Path(root))


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
