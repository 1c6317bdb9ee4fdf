"""Finished parts of a preparation on disk, so that a killed one goes on where it stood.

    <output>.shards/job.json      what the shards were made from; other work is removed
    <output>.shards/lock          held by the live preparation
    <output>.shards/000000.shard  SHA-256 of all that follows, a JSON line, raw columns

A shard is renamed into place when written and believed only if its hash agrees, which is why it is
not flushed to disk first. Whenever a kill comes, what is left is recognised: job.json and the lock
are removed last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zaya_train.config.errors import DataError, StorageError
from zaya_train.data.corpus_writer import Block
from zaya_train.data.sections import SECTION_DTYPE
from zaya_train.runtime.files import storing, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_LOG = logging.getLogger(__name__)
JOB, LOCK = "job.json", "lock"
_PART = re.compile(rf"[0-9]+\.shard(\.[0-9]+)?|\.{re.escape(JOB)}\.partial-[0-9]+")
"""Names of shards, and of files that a kill left unfinished."""


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What one shard of the input became."""

    blocks: Mapping[str, Block]
    """By part, such as `train`."""
    heldout_rows: tuple[str, ...]
    """Held-out conversations, one JSON text each."""
    examples: tuple[str, ...]
    """The first rejected documents, described."""
    compared: int = 0
    """Documents that two encoders made the same of; see fast_encoder."""


@contextmanager
def shard_folder(output: Path, job: Mapping[str, Any], spare: Path) -> Iterator[Path]:
    """The folder for the shards of `job`, with those that an earlier preparation finished.

    It is removed at the end, unless the block was ended with a shard finished by what has nothing
    to do with the input: an interrupt, a file system that refuses, a worker that was killed. Where
    another process prepares the same output now, `spare` is made and used.

    Raises:
        DataError: the folder's name is taken by something else.
        StorageError: the file system refused.
    """
    folder = output.with_name(f"{output.name}.shards")
    lock = _locked(folder)
    if lock is None:
        spare.mkdir()
        try:
            yield spare
        finally:
            shutil.rmtree(spare, ignore_errors=True)
        return
    keep = True
    try:
        _adopt(folder, json.loads(json.dumps(job)))
        keep = False
        yield folder
    except (KeyboardInterrupt, SystemExit, OSError, StorageError):
        keep = any(folder.glob("*.shard"))
        if keep:
            _LOG.warning("%s: finished shards kept; the same command goes on from them", folder)
        raise
    finally:
        if not keep:
            _remove(folder)
        os.close(lock)


def discard_shards(output: Path) -> None:
    """Remove what a killed preparation of `output` left, unless a live one works there."""
    folder = output.with_name(f"{output.name}.shards")
    if not folder.is_dir() or not _is_ours(folder):
        return
    lock = _locked(folder)
    if lock is not None:
        try:
            _remove(folder)
        finally:
            os.close(lock)


def shard_path(folder: Path, index: int) -> Path:
    """Where shard `index` lies."""
    return folder / f"{index:06d}.shard"


def write_shard(path: Path, result: ShardResult) -> None:
    """Write a shard whole or not at all; OSError where the file system refuses."""
    header = {
        "heldout_rows": result.heldout_rows,
        "examples": result.examples,
        "compared": result.compared,
        "blocks": {name: _describe(block) for name, block in result.blocks.items()},
    }
    columns = [column for block in result.blocks.values() for column in _columns(block)]
    body = b"".join([json.dumps(header).encode() + b"\n", *(c.tobytes() for c in columns)])
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(hashlib.sha256(body).hexdigest().encode() + b"\n")
            stream.write(body)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_shard(path: Path) -> ShardResult | None:
    """A finished shard; None where there is none or its content is not what was written."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        _LOG.warning("%s: content differs from its hash; made anew", path)
        return None
    line, _, raw = body.partition(b"\n")
    header = json.loads(line)
    blocks: dict[str, Block] = {}
    offset = 0
    for name, about in header["blocks"].items():
        columns: list[Any] = []
        for dtype, count in zip(_dtypes(about["dtype"]), about["counts"], strict=True):
            columns.append(np.frombuffer(raw, dtype, count, offset))
            offset += count * dtype.itemsize
        tokens, lengths, sections, section_counts = columns
        blocks[name] = Block(tokens, lengths, sections, section_counts, about["rejects"])
    return ShardResult(
        blocks, tuple(header["heldout_rows"]), tuple(header["examples"]), header["compared"]
    )


def _columns(block: Block) -> tuple[Any, ...]:
    return block.tokens, block.lengths, block.sections, block.section_counts


def _dtypes(tokens: str) -> tuple[np.dtype, ...]:
    return np.dtype(tokens), np.dtype("<i8"), SECTION_DTYPE, np.dtype("<i8")


def _describe(block: Block) -> dict[str, Any]:
    return {
        "dtype": block.tokens.dtype.str,
        "counts": [len(column) for column in _columns(block)],
        "rejects": dict(block.rejects),
    }


def _locked(folder: Path) -> int | None:
    """Descriptor of the folder's lock, which ends with this process; None if another holds it.

    The one who held it may have removed the folder in the meantime; then it is made again.
    """
    with storing(folder):
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_ino == os.stat(folder / LOCK).st_ino:
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            os.close(descriptor)


def _is_ours(folder: Path) -> bool:
    """Whether a preparation made a folder, however far it came in making or removing it."""
    names = {path.name for path in folder.iterdir()} - {LOCK}
    return JOB in names or all(map(_PART.fullmatch, names))


def _adopt(folder: Path, job: Mapping[str, Any]) -> None:
    """Keep the shards of this very job, remove those of another."""
    if not _is_ours(folder):
        (folder / LOCK).unlink()
        raise DataError(f"{folder}: exists and holds no shards of data prepare")
    try:
        same = json.loads((folder / JOB).read_text(encoding="utf-8")) == job
    except (FileNotFoundError, ValueError):
        same = False
    if same:
        count = len(list(folder.glob("*.shard")))
        _LOG.warning("%s: going on from %d finished shards", folder, count)
        return
    _empty(folder)
    write_json(folder / JOB, job)


def _empty(folder: Path) -> None:
    """Remove all but job.json and the lock."""
    for path in folder.iterdir():
        if path.name not in (JOB, LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove the folder as far as the file system allows, what tells that it is ours last."""
    with suppress(OSError):
        _empty(folder)
        (folder / JOB).unlink(missing_ok=True)
        (folder / LOCK).unlink()
        folder.rmdir()
