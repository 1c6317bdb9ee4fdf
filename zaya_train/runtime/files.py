"""Files and folders that appear under their name only when whole, and what identifies a file.

The one home of temporary names, flushing, renaming and file hashes. A leaf that every room may
import (docs/decisions/0005): standard library and error classes only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from zaya_train.config.errors import DataError, StorageError, ZayaError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

INCIDENTS_FILE = "incidents.jsonl"
"""In a run directory: what went wrong, a line each, by the guard and the supervisor."""
_REFUSALS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
        errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG,
        errno.ESTALE,
    }
)  # fmt: skip
"""Errors of the device, its rights or what stands in the way; a missing input is none of them."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says where the file system has no locks."""


def is_refusal(error: OSError) -> bool:
    """Whether the file system refused, as opposed to an input file that is missing."""
    return error.errno in _REFUSALS


def named_failure(error: OSError) -> ZayaError:
    """The one-line form of an error that names a file: a StorageError where the file system
    refused, else a DataError (no such file). Raises one that names none: that is a bug of ours."""
    if error.filename is None:
        raise error
    kind = StorageError if is_refusal(error) else DataError
    return kind(f"{error.filename}: {error.strerror or first_line(error)}")


@contextmanager
def storing(target: Path) -> Iterator[None]:
    """Turn the file system's refusals inside the block into one StorageError about `target`."""
    try:
        yield
    except OSError as error:
        if not is_refusal(error):
            raise
        place = f"{error.filename}: " if error.filename else ""
        raise StorageError(f"{target}: not written: {place}{error.strerror or error}") from error


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; the file written there, flushed to disk, takes its place.

    After an error or an interrupt `target` is as it was.

    Raises:
        StorageError: the file system refused (full disk, permission).
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync_path(partial)
            partial.replace(target)
            sync_path(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8; see `whole_file`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; see `whole_file`."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by the JSON of `content`; see `whole_file`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def set_aside(path: Path, problem: Exception) -> None:
    """Give the damaged file `path` the name NAME.bad, in place of an earlier one, and warn."""
    bad = path.with_name(f"{path.name}.bad")
    with storing(bad):
        path.replace(bad)
    log.warning("%s; it is %s now", problem, bad.name)


class Records:
    """Appends lines to the file at `path`, in order; it is made by the first.

    What the file system refuses waits in memory and is tried again with the next line. One process
    of a run writes records: an error there would end it alone, and its peers by its loss, for the
    sake of a line. A line is one write in append mode, which is whole beside other processes' ones
    wherever the file system takes it whole. Where the file is `shared`, a line that another process
    was killed inside is ended first: the next one would be lost in it.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        self.path = path
        self._shared = shared
        self._file: IO[bytes] | None = None
        self._waiting = bytearray()

    def append(self, line: bytes) -> None:
        """Hand `line` to the operating system, or keep it; logs where that changes."""
        waited = bool(self._waiting)
        if self._shared and not waited and _ends_torn(self.path):
            self._waiting += b"\n"
        self._waiting += line + b"\n"
        try:
            self._write()
        except OSError as error:
            if not waited:
                log.warning("%s: lines wait: %s", self.path, error.strerror)
        else:
            if waited:
                log.info("%s: written again, nothing was lost", self.path)

    def open(self) -> None:
        """Raises StorageError where the file cannot be opened for append."""
        try:
            self._opened()
        except OSError as error:
            raise self._refused(error) from error

    def sync(self) -> None:
        """Write what waits and flush all to disk; raises StorageError where that is refused."""
        try:
            self._write()
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def truncate(self, size_bytes: int) -> None:
        """Cut the file off; raises StorageError where that is refused."""
        try:
            self._opened().truncate(size_bytes)
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Try what waits a last time and let the file go; safe to call twice."""
        try:
            self._write()
        except OSError as error:
            log.error("%s: %d bytes lost: %s", self.path, len(self._waiting), error.strerror)
        self.drop()

    def drop(self) -> None:
        """Let the file go without what waits."""
        self._waiting.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self) -> None:
        """All that waits; what a full disk still took of a line is not written again."""
        while self._waiting:
            del self._waiting[: self._opened().write(self._waiting)]

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        return self._file

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path}: cannot be written: {error.strerror or error}")


def _ends_torn(path: Path) -> bool:
    """Whether the last byte of a file is no newline; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return file.read() not in (b"", b"\n")
    except OSError:
        return False


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target`; on success it takes the place of `target`.

    Everything below it is flushed to disk before the rename. After an error or an interrupt the
    temporary directory is gone and `target` is as it was; what a kill leaves behind is removed by
    the next writer's `remove_leftovers`.

    Raises:
        StorageError: the file system refused (full disk, permission).
    """
    parent = target.absolute().parent
    temporary = parent / f".tmp-{target.name}-{uuid.uuid4().hex[:12]}"
    with storing(target):
        parent.mkdir(parents=True, exist_ok=True)
        with _writer_lock(_lock_of(temporary)):
            try:
                temporary.mkdir()
                yield temporary
                _sync_tree(temporary)
                _replace(temporary, target)
                sync_path(parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def copy_folder_once(source: Path, target: Path) -> None:
    """Copy `source` to `target` unless that is there; StorageError leaves nothing half copied."""
    if target.exists():
        return
    remove_leftovers(target)
    try:
        with whole_directory(target) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
    except shutil.Error as error:
        raise StorageError(f"{target}: cannot be copied from {source}: {error}") from error


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers of the directory `target` left beside it.

    A writer is dead when its lock is free. Only writers of this machine are judged: a lock of
    another may be invisible here. Where one died between moving an earlier `target` aside and
    putting the new one in its place, the earlier one is put back.
    """
    parent = target.absolute().parent
    name = re.compile(rf"\.tmp-{re.escape(target.name)}-[0-9a-f]{{12}}\.lock")
    if not parent.is_dir():
        return
    for lock in sorted(path for path in parent.iterdir() if name.fullmatch(path.name)):
        try:
            with lock.open("r+", encoding="utf-8") as stream:
                if stream.read() == os.uname().nodename:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove_dead(lock, target)
        except (BlockingIOError, FileNotFoundError):
            continue  # alive, or removed by another process meanwhile
        except OSError as error:
            log.warning("%s: left by a killed process, not removed: %s", lock, error)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Flush a file's content, or the names in a directory, so that they survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.lock")


def _aside(temporary: Path) -> Path:
    """Where an earlier target waits while `temporary` takes its name."""
    return temporary.with_name(f"{temporary.name}.old")


@contextmanager
def _writer_lock(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process and its children, however they end.

    The file names the machine only once the lock is held, so nobody takes a writer that is about to
    lock for a dead one. Where the file system has no locks it stays empty: such a writer is never
    taken for dead.
    """
    with path.open("x", encoding="utf-8") as stream:
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                log.debug("%s: not locked: %s", path, error)
            else:
                stream.write(os.uname().nodename)
                stream.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


def _remove_dead(lock: Path, target: Path) -> None:
    """Remove the folders that go with a dead writer's lock, then the lock."""
    temporary = lock.with_name(lock.name.removesuffix(".lock"))
    aside = _aside(temporary)
    if aside.exists() and not target.exists():
        log.warning("%s: put back, a process was killed while replacing it", target)
        aside.rename(target)
    for folder in (temporary, aside):
        if folder.exists():
            log.warning("removing %s, left by a killed process", folder)
            shutil.rmtree(folder)
    lock.unlink()


def _replace(temporary: Path, target: Path) -> None:
    """Rename over `target`; an existing one is moved aside first and removed last."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = _aside(temporary)
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
            sync_path(Path(root, name))
        sync_path(Path(root))
