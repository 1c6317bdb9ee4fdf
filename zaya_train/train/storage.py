"""Names and file operations of a directory of checkpoints. Nothing here is collective."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from typing import TYPE_CHECKING, TextIO

from zaya_train.config.errors import StorageError
from zaya_train.runtime.files import sync_path
from zaya_train.train.manifest import MANIFEST_NAME, Manifest, encode

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

STEP_NAME = re.compile(r"step-(\d{8})")
LEFTOVER_NAME = re.compile(r"step-\d{8}\.(tmp|trash)")
BAD_NAME = re.compile(r"step-\d{8}\.bad(-\d+)?")
LOCK_NAME = ".writer.lock"
LOCK_POLL_SECONDS = 0.1


def step_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def fresh_directory(path: Path) -> None:
    """Make `path` an empty directory, whatever was there."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest and sync it and the directory; refuses to replace one."""
    with (directory / MANIFEST_NAME).open("xb") as stream:
        stream.write(encode(manifest))
    sync_path(directory / MANIFEST_NAME)
    sync_path(directory)


def replace_manifest(partial: Path, target: Path, manifest: Manifest) -> None:
    """Give the checkpoint `target` another manifest of the same files, in one durable step.

    It is made in `partial`, where a writer that dies leaves it to `remove_leftovers`.
    """
    (partial / MANIFEST_NAME).unlink()
    write_manifest(partial, manifest)
    (partial / MANIFEST_NAME).replace(target / MANIFEST_NAME)
    sync_path(target)


def publish(partial: Path, target: Path) -> None:
    """Give a complete directory its final name, durably."""
    partial.rename(target)
    sync_path(target.parent)


def delete(path: Path) -> None:
    """Remove a checkpoint; under its final name it is whole until the moment it is gone."""
    trash = path.with_name(f"{path.name}.trash")
    path.rename(trash)
    shutil.rmtree(trash)


def move_aside(path: Path, reason: str) -> None:
    """Rename a damaged checkpoint to the next free `.bad` name."""
    aside = path.with_name(f"{path.name}.bad")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.bad-{number}")
    path.rename(aside)
    log.error("%s moved to %s: %s", path, aside.name, reason)


def remove_leftovers(root: Path) -> None:
    """Remove what writers and deletions that died left behind; the caller holds the lock."""
    for name in list_names(root, LEFTOVER_NAME):
        log.warning("removing %s, left unfinished by an earlier process", root / name)
        shutil.rmtree(root / name)


def list_steps(root: Path) -> list[int]:
    """Steps that have a directory of their final name, ascending; verified or not."""
    return sorted(int(name.removeprefix("step-")) for name in list_names(root, STEP_NAME))


def list_names(root: Path, pattern: re.Pattern[str]) -> list[str]:
    """Names below `root` that match `pattern` as a whole, sorted; none if `root` is absent."""
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if pattern.fullmatch(path.name))


def acquire_lock(path: Path, wait_seconds: float) -> TextIO:
    """Take the writer's lock; closing the returned file, or the end of the process, frees it.

    A POSIX record lock: unlike flock it is not inherited by forked data workers, which may outlive
    a killed rank, and it works on NFS.

    Raises:
        StorageError: another process still holds it after `wait_seconds`.
    """
    stream = path.open("a+", encoding="utf-8")
    deadline = time.monotonic() + wait_seconds
    while not _try_lock(stream):
        if time.monotonic() >= deadline:
            stream.seek(0)
            owner = stream.read().strip() or "unknown process"
            stream.close()
            raise StorageError(
                f"{path.parent}: another run writes checkpoints here ({owner}); "
                f"waited {wait_seconds:g} s for it to end"
            )
        time.sleep(LOCK_POLL_SECONDS)
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    stream.flush()
    return stream


def _try_lock(stream: TextIO) -> bool:
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, depending on the system
        return False
    return True
