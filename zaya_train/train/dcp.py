"""torch's distributed checkpoint (DCP) as this project uses it: hashed writing, checked reading.

Differences from DCP's own file-system storage: every byte is hashed on its way to the disk, so the
manifest describes what was meant and not what was stored; `.metadata` holds neither path, random
identifier nor where a tensor lay (pinned copy or parameter), so equal tensors on an equal mesh give
equal files; reading unpickles `.metadata` only
after its hash was compared, and only into the handful of classes it is made of.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from zaya_train.config.errors import CheckpointError, StorageError
from zaya_train.train.manifest import METADATA_NAME, FileEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.storage import WriteResult
    from torch.futures import Future

METADATA_CLASSES = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    }
)
"""All that DCP's pickled metadata of a flat dictionary of tensors consists of, besides dtypes."""


def write(
    tensors: Mapping[str, torch.Tensor], directory: Path, group: dist.ProcessGroup
) -> list[FileEntry]:
    """Write `tensors` into `directory`; returns the files this rank wrote. Collective over `group`.

    Raises:
        StorageError: on all ranks, if the file system of one refused.
        CheckpointError: on all ranks, if DCP found something else wrong on one.
    """
    writer = _HashingWriter(directory)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        refused = any(isinstance(cause, OSError) for cause, _ in error.failures.values())
        kind = StorageError if refused else CheckpointError
        raise kind(f"{directory.name}: {describe(error)}") from error
    return writer.files()


def read(
    tensors: Mapping[str, torch.Tensor],
    directory: Path,
    manifest: Manifest,
    group: dist.ProcessGroup | None,
) -> None:
    """Fill `tensors` in place. Collective over `group`; None reads in this process alone.

    Raises:
        CheckpointError: on all ranks, if a rank could not read.
    """
    reader = _CheckedReader(directory, manifest)
    try:
        with warnings.catch_warnings():
            # Reading without a process group is what was asked for; DCP warns that it assumes so.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise CheckpointError(f"{directory}: {describe(error)}") from error


def describe(error: CheckpointException) -> str:
    """The failures of a DCP call in one line: rank, kind, message.

    CheckpointException derives from BaseException, so it must not leave this module.
    """
    parts = []
    for rank, (cause, _) in sorted(error.failures.items()):
        text = " ".join(str(cause).split())
        parts.append(f"rank {rank}: {type(cause).__name__}: {text}")
    return "; ".join(parts)


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


class _HashingStream(io.RawIOBase):
    """A file opened for writing that hashes what passes and names itself in its errors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("wb")
        self._digest: _Hash = hashlib.sha256()
        self._size_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._stream.write(view)
        except OSError as error:
            raise self._named(error) from error
        self._digest.update(view)
        self._size_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size_bytes

    def flush(self) -> None:
        if self._stream.closed:
            return
        try:
            self._stream.flush()
        except OSError as error:
            raise self._named(error) from error

    def fileno(self) -> int:
        self.flush()
        return self._stream.fileno()

    def close(self) -> None:
        if not self._stream.closed:
            try:
                self._stream.close()
            except OSError as error:
                raise self._named(error) from error
        super().close()

    def entry(self) -> FileEntry:
        return FileEntry(
            name=self._path.name, size_bytes=self._size_bytes, sha256=self._digest.hexdigest()
        )

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, os.strerror(error.errno or 0), str(self._path))


class _HashingFileSystem(FileSystem):
    """DCP's local file system, keeping the entry of every file it wrote under its final name."""

    def __init__(self) -> None:
        self.entries: dict[Path, FileEntry] = {}

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        stream = _HashingStream(Path(path))
        try:
            yield stream
        finally:
            stream.close()
        self.entries[Path(path)] = stream.entry()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        old = self.entries.pop(Path(path))
        target = Path(new_path)
        self.entries[target] = FileEntry(
            name=target.name, size_bytes=old.size_bytes, sha256=old.sha256
        )


class _HashingWriter(FileSystemWriter):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory, overwrite=False)
        self._hashing = _HashingFileSystem()
        self.fs = self._hashing

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.properties = TensorProperties(dtype=entry.properties.dtype)
        super().finish(metadata, results)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save's zip writer covers the file's OSError with its own "failed writing file".
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def files(self) -> list[FileEntry]:
        return list(self._hashing.entries.values())


class _CheckedReader(FileSystemReader):
    def __init__(self, directory: Path, manifest: Manifest) -> None:
        super().__init__(directory)
        self._metadata_path = directory / METADATA_NAME
        self._metadata_entry = manifest.file(METADATA_NAME)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        # Not named `kwargs`: DCP would take that as an offer of per-rank metadata and, where this
        # fails, fall back to a path without collectives that leaves the other ranks waiting.
        data = self._metadata_path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self._metadata_entry.sha256:
            raise CheckpointError(f"{self._metadata_path}: does not match the manifest's sha256")
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{self._metadata_path}: holds a {type(metadata).__name__}")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles DCP metadata and nothing else: a forged checkpoint cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")
