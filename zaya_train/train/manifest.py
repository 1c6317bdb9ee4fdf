"""What a checkpoint directory says about itself, and the check that it is still true.

`MANIFEST.json` lists every file with size and SHA-256, every tensor with shape and dtype, and the
state of the run that is not a tensor. torch's distributed checkpoint verifies nothing when it reads
(a flipped bit loads silently), so this list is what makes a checkpoint trustworthy. The manifest
carries the hash of its own contents, and its bytes must be exactly those that were written.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import CheckpointError
from zaya_train.runtime.files import file_sha256

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST_NAME = "MANIFEST.json"
METADATA_NAME = ".metadata"
DATA_SUFFIX = ".distcp"
FORMAT_VERSION = 3
_READ_VERSIONS = (2, FORMAT_VERSION)
"""Version 2 had no `identity`."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """The state of a run that is not a tensor; plain JSON values only."""

    step: int
    """Optimizer steps done."""
    phase_name: str
    phase_index: int
    train_state: dict[str, Any]
    """The loop's own small state: tokens consumed, data cursor, counters."""
    model: dict[str, Any]
    """The model configuration as a dictionary."""
    mesh: dict[str, int]
    """Mesh axis -> size at the time of saving; for people, loading does not need it."""
    config_hash: str
    lineage: dict[str, Any]
    """Seed, phases and corpora behind the checkpoint; see phases.lineage."""
    keep: bool = False
    """Never deleted by retention: the end of a phase."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What decided the curve that led here (train.identity); empty where not recorded."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    shape: tuple[int, ...]
    """Global shape, whatever the sharding was."""
    dtype: str
    """torch's name without the prefix: float32, bfloat16, int64."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of MANIFEST.json."""

    torch_version: str
    files: tuple[FileEntry, ...]
    tensors: dict[str, TensorEntry]
    record: CheckpointRecord
    format_version: int = FORMAT_VERSION

    def file(self, name: str) -> FileEntry:
        """The entry of `name`; CheckpointError if the checkpoint has no such file."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise CheckpointError(f"{MANIFEST_NAME}: lists no file {name!r}")


def encode(manifest: Manifest) -> bytes:
    """The bytes of MANIFEST.json: sorted keys, one key per line, the hash of the rest in front.

    Raises:
        TypeError, ValueError: the record holds something that is no JSON value (NaN included).
    """
    return _sealed(asdict(manifest))


def decode(data: bytes) -> Manifest:
    """The manifest in `data`.

    Raises:
        CheckpointError: not a manifest of this format version, or not the bytes that were written.
    """
    try:
        body = json.loads(data)["manifest"]
        version = body["format_version"]
        if version not in _READ_VERSIONS:
            raise CheckpointError(
                f"{MANIFEST_NAME}: format {version!r}, this version reads "
                f"{' and '.join(map(str, _READ_VERSIONS))}"
            )
        intact = _sealed(body) == data
        if version < FORMAT_VERSION:
            body["record"]["identity"] = {}
        manifest = _build(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST_NAME}: not a manifest ({error!r})") from error
    if not intact:
        raise CheckpointError(f"{MANIFEST_NAME}: its contents do not match its own hash")
    return manifest


def read(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory; CheckpointError if there is none or it is damaged."""
    return decode(read_bytes(directory))


def read_bytes(directory: Path) -> bytes:
    """The raw manifest; CheckpointError if it cannot be read."""
    try:
        return (directory / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_NAME}: {error.strerror}") from error


def file_problem(directory: Path, entry: FileEntry) -> str | None:
    """Why the file on disk is not the one in the manifest, or None."""
    problem = size_problem(directory, entry)
    if problem:
        return problem
    try:
        found = file_sha256(directory / entry.name)
    except OSError as error:
        return f"{entry.name}: {error.strerror}"
    if found != entry.sha256:
        return f"{entry.name}: sha256 {found[:12]}, the manifest says {entry.sha256[:12]}"
    return None


def size_problem(directory: Path, entry: FileEntry) -> str | None:
    """Why the file on disk cannot be the one in the manifest, without reading it, or None."""
    path = directory / entry.name
    if path.name != entry.name:
        return f"{entry.name}: not a plain file name"
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        return f"{entry.name}: {error.strerror}"
    if size_bytes != entry.size_bytes:
        return f"{entry.name}: {size_bytes} bytes, the manifest says {entry.size_bytes}"
    return None


def layout_problems(directory: Path, manifest: Manifest, step: int) -> list[str]:
    """Problems that show without reading file contents: another step's manifest, strange files."""
    problems = []
    if manifest.record.step != step:
        problems.append(f"{MANIFEST_NAME}: of step {manifest.record.step}, not {step}")
    listed = {entry.name for entry in manifest.files}
    if METADATA_NAME not in listed:
        problems.append(f"{MANIFEST_NAME}: lists no {METADATA_NAME}")
    present = {path.name for path in directory.glob(f"*{DATA_SUFFIX}")}
    problems += [f"{name}: not in the manifest" for name in sorted(present - listed)]
    return problems


def _build(body: dict[str, Any]) -> Manifest:
    return Manifest(
        torch_version=body["torch_version"],
        files=tuple(FileEntry(**entry) for entry in body["files"]),
        tensors={
            key: TensorEntry(shape=tuple(entry["shape"]), dtype=entry["dtype"])
            for key, entry in body["tensors"].items()
        },
        record=CheckpointRecord(
            **{entry.name: body["record"][entry.name] for entry in fields(CheckpointRecord)}
        ),
    )


def _sealed(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(_dump(body)).hexdigest()
    return _dump({"sha256": digest, "manifest": body})


def _dump(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"
