"""Checkpoints that are whole or do not count.

A checkpoint is written to `step-00000120.tmp`, every file hashed into `MANIFEST.json`, everything
synced, the directory renamed to `step-00000120`, read back and compared; only then are older ones
deleted. Whatever kills the writers, a directory with its final name was complete. Other names:
`.tmp` an unfinished save, `.trash` a deletion under way (both removed at the next start), `.bad` a
checkpoint that failed verification and was moved aside for a person to look at.

All methods of `CheckpointStore` are collective over all ranks: every rank calls them in the same
order, and a failure on one rank is raised on all, with the process group still usable.
"""

from __future__ import annotations

import logging
import shutil
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from zaya_train.config.errors import (
    CheckpointError,
    ConfigError,
    NumericsError,
    StorageError,
)
from zaya_train.train import dcp, storage
from zaya_train.train import manifest as manifests
from zaya_train.train.manifest import CheckpointRecord, FileEntry, Manifest, TensorEntry
from zaya_train.train.peers import Peers
from zaya_train.train.restore import (
    Found,
    brief,
    check_entries,
    check_model,
    entries_of,
    find_newest,
    inspect,
    verify,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run, below `root`, which all ranks see (a shared file system).

    Constructing is collective: it makes the store's own gloo group, so that its traffic never mixes
    with training's, takes the writer's lock and removes what dead writers left unfinished. `close`
    gives the lock back; so does the end of the process, however it ends.

    Args:
        keep_last: newest checkpoints to keep, at least 2; those saved with `keep` stay besides.
        timeout_seconds: longest wait for a peer, which may be writing or hashing a large file.
        lock_wait_seconds: how long a predecessor that is still dying may hold the lock.

    Raises:
        ConfigError: `keep_last` below 2.
        StorageError: another process writes to `root`, or it cannot be created.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        *,
        timeout_seconds: float = 3600.0,
        lock_wait_seconds: float = 30.0,
    ) -> None:
        if keep_last < 2:
            raise ConfigError(f"checkpoint.keep_last={keep_last}: must be at least 2")
        self.root = root
        self._keep_last = keep_last
        self._unusable_steps: set[int] = set()
        self._lock: TextIO | None = None
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._peers = Peers(cast("dist.ProcessGroup", group))
        self._peers.first(lambda: self._open(lock_wait_seconds))

    def close(self) -> None:
        """Give the writer's lock back. Not collective."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def save(self, tensors: Mapping[str, Tensor], record: CheckpointRecord) -> Path:
        """Write a checkpoint and return its directory.

        Args:
            tensors: the same keys on every rank; DTensors are written shard by shard. A plain
                tensor has one value: it must be equal on all ranks, and one of them writes it.
            record: the same on every rank.

        Saving a step that exists already, as happens after a resume from an older one: an equal
        checkpoint stays as it is; one that does not verify, or that `newest` skipped, is moved
        aside; one that is sound and different is never overwritten.

        Raises:
            NumericsError: a tensor is not finite; nothing was written.
            StorageError: a rank could not write, or the files read back are not those written.
            CheckpointError: ranks disagree about the tensors, the record is not plain JSON, or the
                step exists with other contents. Older checkpoints are intact in every case.
        """
        target = self.root / storage.step_name(record.step)
        partial = target.with_name(f"{target.name}.tmp")
        self._peers.everywhere(lambda: _check_record(record))
        entries = self._survey(tensors, record.step)
        try:
            self._peers.first(lambda: storage.fresh_directory(partial))
            group = cast("dist.ProcessGroup", self._peers.group)
            written = self._peers.gather(dcp.write(tensors, partial, group))
            manifest = Manifest(
                torch_version=torch.__version__,
                files=tuple(sorted((f for part in written for f in part), key=lambda f: f.name)),
                tensors=entries,
                record=record,
            )
            self._peers.first(lambda: storage.write_manifest(partial, manifest))
            published = self._publish(partial, target, manifest.files)
        except (StorageError, CheckpointError):
            self._peers.first(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise
        if published:
            self._confirm(target)
            self._peers.first(lambda: self._retire(record.step))
        return target

    def newest(self) -> Found | None:
        """The newest checkpoint that verifies; None if nothing was ever saved here.

        Raises:
            CheckpointError: there are checkpoints and none verifies; names each with its reason.
        """
        found, skipped = find_newest(self.root, self._peers)
        for step, problems in skipped.items():
            log.warning("skipping checkpoint %s: %s", storage.step_name(step), brief(problems))
        self._unusable_steps.update(skipped)
        return found

    def verify(self, path: Path) -> list[str]:
        """What is wrong with the checkpoint at `path`, empty if nothing."""
        return verify(path, self._peers)

    def load(self, found: Found, tensors: Mapping[str, Tensor], model: Mapping[str, Any]) -> None:
        """Fill `tensors` in place from a verified checkpoint of any mesh and world size.

        Args:
            tensors: exactly the checkpoint's keys, global shapes and dtypes.
            model: the model configuration as a dictionary; the checkpoint's must equal it except
                in the fields MODEL_MAY_CHANGE (config.diff).

        Raises:
            CheckpointError: the checkpoint is of another model, or cannot be read. Nothing was
                loaded, unless a file vanished meanwhile.
        """

        def compare() -> None:
            check_model(found, model)
            check_entries(found, entries_of(tensors))

        self._peers.everywhere(compare)
        dcp.read(tensors, found.path, found.manifest, self._peers.group)

    def _open(self, lock_wait_seconds: float) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = storage.acquire_lock(self.root / storage.LOCK_NAME, lock_wait_seconds)
        storage.remove_leftovers(self.root)

    def _survey(self, tensors: Mapping[str, Tensor], step: int) -> dict[str, TensorEntry]:
        """Check that ranks agree on step, keys, shapes and plain tensors, and all is finite."""
        entries = entries_of(tensors)
        plain = _plain_digests(tensors)
        signature = sha256(repr((step, sorted(entries.items()))).encode()).hexdigest()
        plain_signature = sha256(repr(sorted(plain.items())).encode()).hexdigest()
        reports = self._peers.gather((signature, plain_signature, _not_finite(tensors)))
        for rank, (theirs, _, _) in enumerate(reports):
            if theirs != reports[0][0]:
                raise CheckpointError(
                    f"rank {rank} saves another step, other keys or other shapes than rank 0"
                )
        bad = [(rank, key) for rank, (_, _, keys) in enumerate(reports) for key in keys]
        if bad:
            rank, key = bad[0]
            raise NumericsError(
                f"tensor {key} on rank {rank} is not finite ({len(bad)} shards in all); "
                "not saved, so that the checkpoints stay good"
            )
        if len({theirs for _, theirs, _ in reports}) > 1:
            raise CheckpointError(_first_difference(self._peers.gather(plain)))
        return entries

    def _publish(self, partial: Path, target: Path, files: tuple[FileEntry, ...]) -> bool:
        """Give the finished directory its name; False if an equal checkpoint has it already."""
        if self._peers.first(target.exists):
            step = int(target.name.removeprefix("step-"))
            existing, problems = inspect(target, self._peers)
            if step in self._unusable_steps and not problems:
                problems = ["could not be verified when this run started"]
            if existing and not problems:
                if existing.files != files:
                    raise CheckpointError(
                        f"{target}: exists, verifies and holds other values than this run has at "
                        "that step; move it away if this run shall replace it"
                    )
                self._peers.first(lambda: shutil.rmtree(partial))
                log.info("%s: exists already with the same contents", target)
                return False
            self._peers.first(lambda: storage.move_aside(target, brief(problems)))
            self._unusable_steps.discard(step)
        self._peers.first(lambda: storage.publish(partial, target))
        return True

    def _confirm(self, target: Path) -> None:
        problems = self.verify(target)
        if problems:
            self._peers.first(lambda: storage.move_aside(target, brief(problems)))
            raise StorageError(
                f"{target}: reads back differently from what was written: {brief(problems)}"
            )

    def _retire(self, newest_step: int) -> None:
        """Delete what retention gives up; called only once `newest_step` has been verified.

        Steps above it are other runs' futures and those known to be damaged do not count as kept.
        A checkpoint that cannot be deleted costs disk, not the run.
        """
        candidates = [
            step
            for step in reversed(storage.list_steps(self.root))
            if step <= newest_step and step not in self._unusable_steps
        ]
        for step in candidates[self._keep_last :]:
            path = self.root / storage.step_name(step)
            try:
                if manifests.read(path).record.keep:
                    continue
                storage.delete(path)
            except (OSError, CheckpointError) as error:
                log.warning("%s: not deleted: %s", path, error)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys whose local shard holds NaN or infinity; one device-to-host copy per device."""
    flags: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for key, value in tensors.items():
        shard: Tensor = value.to_local() if isinstance(value, DTensor) else value
        if shard.is_floating_point() and shard.numel():
            flags.setdefault(shard.device, []).append((key, shard.detach().isfinite().all()))
    bad = []
    for named in flags.values():
        finite = torch.stack([flag for _, flag in named]).tolist()
        bad += [key for (key, _), good in zip(named, finite, strict=True) if not good]
    return sorted(bad)


def _plain_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hashes of the values of the tensors that are no DTensors: buffers and counters, small."""
    digests = {}
    for key, value in tensors.items():
        if not isinstance(value, DTensor):
            bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digests[key] = sha256(bits.numpy().data).hexdigest()
    return digests


def _first_difference(digests: list[dict[str, str]]) -> str:
    rank, key = next(
        (rank, key)
        for rank, theirs in enumerate(digests)
        for key, digest in sorted(theirs.items())
        if digest != digests[0][key]
    )
    return (
        f"plain tensor {key} on rank {rank} differs from rank 0's: only one of them would be "
        "saved; replicas have come apart, or it is per-rank state and needs a key per rank"
    )


def _check_record(record: CheckpointRecord) -> None:
    if not 0 <= record.step < 10**8:
        raise CheckpointError(f"step {record.step}: a checkpoint's step has at most 8 digits")
    try:
        manifests.encode(Manifest(torch_version="", files=(), tensors={}, record=record))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"record of step {record.step}: not plain JSON: {error}") from error
