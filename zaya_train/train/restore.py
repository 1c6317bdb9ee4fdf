"""Finding, verifying and reading checkpoints, by all ranks together or by one process alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zaya_train.config.diff import model_differences
from zaya_train.config.errors import CheckpointError
from zaya_train.train import dcp
from zaya_train.train import manifest as manifests
from zaya_train.train.manifest import CheckpointRecord, FileEntry, Manifest, TensorEntry
from zaya_train.train.peers import Peers
from zaya_train.train.staging import HostCopies, local_shard
from zaya_train.train.storage import (
    BAD_NAME,
    STEP_NAME,
    list_names,
    list_steps,
    step_name,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


_WRITER = re.compile(r"__(\d+)_")
"""DCP's names of data files begin with the rank that wrote them."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that was verified."""

    path: Path
    manifest: Manifest

    @property
    def record(self) -> CheckpointRecord:
        return self.manifest.record


def verify(path: Path, peers: Peers | None = None) -> list[str]:
    """What is wrong with the checkpoint at `path`, empty if nothing; files split over the ranks."""
    return inspect(path, peers or Peers())[1]


def verified(path: Path, peers: Peers) -> Found:
    """The checkpoint in directory `path`, every byte of it read. Collective.

    Raises:
        CheckpointError: it is none, or does not verify; says what is wrong.
    """
    manifest, problems = inspect(path, peers)
    if manifest is None or problems:
        raise CheckpointError(f"{path}: {brief(problems)}")
    return Found(path, manifest)


def find_newest(
    root: Path, peers: Peers | None = None
) -> tuple[Found | None, dict[int, list[str]]]:
    """The newest checkpoint below `root` that verifies, and the problems of each step above it.

    Raises:
        CheckpointError: there are checkpoints and none verifies; names each with its reason. (Only
            None means "nothing was ever saved": a run must not silently start from zero.)
    """
    peers = peers or Peers()
    steps, bad_names = peers.first(lambda: (list_steps(root), list_names(root, BAD_NAME)))
    skipped: dict[int, list[str]] = {}
    for step in reversed(steps):
        path = root / step_name(step)
        manifest, problems = inspect(path, peers)
        if manifest and not problems:
            return Found(path, manifest), skipped
        skipped[step] = problems
    reasons = [f"{step_name(step)}: {brief(problems)}" for step, problems in skipped.items()]
    reasons += [f"{name}: moved aside earlier" for name in bad_names]
    if reasons:
        raise CheckpointError(f"{root}: no usable checkpoint: {' | '.join(reasons)}")
    return None, skipped


def load_full(path: Path, key_prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors of a checkpoint whose keys start with `key_prefix`, on the CPU.

    Verifies first, needs no process group and ignores one that exists: for export and inspection.

    Raises:
        CheckpointError: the checkpoint does not verify, or no key starts with `key_prefix`.
    """
    manifest = verified(path, Peers()).manifest
    tensors = {
        key: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for key, entry in manifest.tensors.items()
        if key.startswith(key_prefix)
    }
    if not tensors:
        raise CheckpointError(f"{path}: no tensor's name starts with {key_prefix!r}")
    dcp.read(tensors, path, manifest, group=None)
    return tensors


def inspect(path: Path, peers: Peers) -> tuple[Manifest | None, list[str]]:
    """The manifest and all problems of a checkpoint; rank 0 reads the one, all hash the files."""

    def read() -> tuple[bytes, str]:
        try:
            return manifests.read_bytes(path), ""
        except CheckpointError as error:
            return b"", str(error)

    data, failure = peers.first(read)
    if failure:
        return None, [failure]
    try:
        manifest = manifests.decode(data)
    except CheckpointError as error:
        return None, [str(error)]
    problems = layout_problems(path, manifest) if peers.rank == 0 else []
    for entry in _share(manifest, peers.rank, peers.size):
        problem = manifests.file_problem(path, entry)
        problems += [problem] if problem else []
    return manifest, sorted({line for part in peers.gather(problems) for line in part})


def layout_problems(path: Path, manifest: Manifest) -> list[str]:
    """What shows without reading the files; a directory's name tells its step before the record."""
    match = STEP_NAME.fullmatch(path.name)
    step = int(match.group(1)) if match else manifest.record.step
    return manifests.layout_problems(path, manifest, step)


def _share(manifest: Manifest, rank: int, size: int) -> list[FileEntry]:
    """The files that one of `size` ranks reads: those of the ranks half the world away, since what
    it wrote itself could come from its node's memory instead of the disk."""

    def writer(entry: FileEntry) -> tuple[int, str]:
        match = _WRITER.match(entry.name)
        return int(match.group(1)) if match else size, entry.name

    ordered = sorted(manifest.files, key=writer)
    return ordered[(rank + size // 2) % size :: size]


def holds(found: Found, tensors: Mapping[str, Tensor], peers: Peers) -> bool:
    """Whether a verified checkpoint of any mesh holds exactly these values. Collective.

    Takes host memory of the size of this rank's shards while it compares.

    Raises:
        CheckpointError: on all ranks, if a rank could not read.
    """
    if found.manifest.tensors != entries_of(tensors):
        return False
    read = HostCopies().take(tensors)
    for value in read.values():
        local_shard(value).zero_()
    dcp.read(read, found.path, found.manifest, peers.group)
    same = all(
        torch.equal(local_shard(read[key]), local_shard(value).cpu())
        for key, value in tensors.items()
    )
    return all(peers.gather(same))


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Global shapes and dtypes as a manifest lists them."""
    return {
        key: TensorEntry(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        for key, value in tensors.items()
    }


def check_model(found: Found, model: Mapping[str, Any]) -> None:
    """CheckpointError naming each field in which the saved model is another."""
    differing = model_differences(found.record.model, json.loads(json.dumps(dict(model))))
    if differing:
        raise CheckpointError(f"{found.path}: of another model: {', '.join(differing)}")


def check_entries(found: Found, wanted: Mapping[str, TensorEntry]) -> None:
    """DCP loads a model with fewer tensors silently, so keys are compared both ways here."""
    saved = found.manifest.tensors
    complaints = []
    for label, keys in (
        ("not in the checkpoint", sorted(wanted.keys() - saved.keys())),
        ("only in the checkpoint", sorted(saved.keys() - wanted.keys())),
    ):
        if keys:
            complaints.append(f"{len(keys)} tensors {label}: {', '.join(keys[:3])}")
    changed = [
        f"{key} is {_show(saved[key])} there, {_show(wanted[key])} here"
        for key in sorted(saved.keys() & wanted.keys())
        if saved[key] != wanted[key]
    ]
    if changed:
        complaints.append(f"{len(changed)} tensors differ: {', '.join(changed[:3])}")
    if complaints:
        raise CheckpointError(f"{found.path}: {'; '.join(complaints)}")


def _show(entry: TensorEntry) -> str:
    return f"{entry.dtype}{list(entry.shape)}"


def brief(problems: list[str]) -> str:
    """The first few problems in one line."""
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
