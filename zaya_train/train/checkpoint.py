"""Checkpoints that are whole or do not count.

A checkpoint is written to `step-00000120.tmp`, every file hashed into `MANIFEST.json`, everything
synced, the directory renamed to `step-00000120`, read back and compared; only then are older ones
deleted. Whatever kills the writers, a directory with its final name was complete. Other names:
`.tmp` an unfinished save, `.trash` a deletion under way (both removed at the next start), `.bad` a
checkpoint that failed verification and was moved aside for a person to look at.

All methods of `CheckpointStore` are collective over all ranks unless they say otherwise: every rank
calls them in the same order, and a failure on one rank is raised on all, with the process group
still usable. A save may run in the background (`start`, `finish`): a thread writes host copies and
speaks to its peers in the store's own group, which nothing else uses meanwhile.
"""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch
import torch.distributed as dist

from zaya_train.config.errors import CheckpointError, ConfigError, StorageError
from zaya_train.train import dcp, storage
from zaya_train.train import manifest as manifests
from zaya_train.train.agreement import agreed_entries
from zaya_train.train.manifest import CheckpointRecord, Manifest, TensorEntry
from zaya_train.train.peers import Peers
from zaya_train.train.restore import (
    Found,
    brief,
    check_entries,
    check_model,
    entries_of,
    find_newest,
    holds,
    inspect,
    verify,
)
from zaya_train.train.staging import HostCopies

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

log = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written and verified."""

    path: Path
    size_bytes: int
    seconds: float
    """From the first byte to the deletion of what retention gave up."""


class CheckpointStore:
    """The checkpoints of one run, below `root`, which all ranks see (a shared file system).

    Constructing is collective: it makes the store's own gloo group, so that its traffic never mixes
    with training's, takes the writer's lock and removes what dead writers left unfinished. `close`
    gives the lock back; so does the end of the process, however it ends.

    Args:
        keep_last: newest checkpoints to keep, at least 2; those saved with `keep` stay besides.
        keep_every_steps: checkpoints of multiples of this stay besides as well; 0 for none.
        timeout_seconds: longest wait for a peer, which may be writing or hashing a large file.
        lock_wait_seconds: how long a predecessor that is still dying may hold the lock.
        device: where the state lies; a thread's own would be the node's first accelerator.

    Raises:
        ConfigError: `keep_last` below 2.
        StorageError: another process writes to `root`, or it cannot be created.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        *,
        keep_every_steps: int = 0,
        timeout_seconds: float = 3600.0,
        lock_wait_seconds: float = 30.0,
        device: torch.device = CPU,
    ) -> None:
        if keep_last < 2:
            raise ConfigError(f"checkpoint.keep_last={keep_last}: must be at least 2")
        self.root = root
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        self._unusable_steps: set[int] = set()
        self._lock: TextIO | None = None
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._peers = Peers(cast("dist.ProcessGroup", group))
        self._copies = HostCopies()
        use = partial(torch.accelerator.set_device_index, device)
        initializer = None if device.type == "cpu" else use
        self._worker = ThreadPoolExecutor(1, "checkpoint", initializer)
        self._under_way: Future[Saved] | None = None
        self._reserved: Future[None] | None = None
        self._peers.first(lambda: self._open(lock_wait_seconds))

    def close(self) -> None:
        """Give the writer's lock back. Not collective, and it waits for no save under way: its
        peers may be gone (`Saver` waits where they are not). Such a save keeps the lock to its end:
        the next run would remove what it is writing."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        if self._under_way:
            self._under_way.add_done_callback(lambda _: self._unlock())
        else:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def save(self, tensors: Mapping[str, Tensor], record: CheckpointRecord) -> Saved:
        """Write a checkpoint and wait until it is verified.

        Args:
            tensors: the same keys on every rank; DTensors are written shard by shard. A plain
                tensor has one value: it must be equal on all ranks, and one of them writes it.
            record: the same on every rank.

        Saving a step that exists already, as happens after a resume from an older one: an equal
        checkpoint stays as it is; one with the same values, written on whatever mesh, takes over
        `record`, for example where the phase that it was in the middle of has been shortened to
        end there; one that does not verify, or that `newest` skipped, is moved aside; one that is
        sound and different is never overwritten.

        Raises:
            NumericsError: a tensor is not finite, or a plain one differs over ranks; nothing was
                written.
            StorageError: a rank could not write, or the files read back are not those written.
            CheckpointError: ranks disagree about keys or shapes, the record is not plain JSON, or
                the step exists with other values. Older checkpoints are intact in every case.
        """
        self._require_idle()
        return self._write(tensors, record, self._agree(tensors, record))

    def start(self, tensors: Mapping[str, Tensor], record: CheckpointRecord) -> None:
        """Begin a save of the values `tensors` have now; they may change once this returns.

        Blocks for the agreement among ranks and a copy to host memory; the rest, verification and
        retention included, runs in a thread. To be followed by `finish` before any other call.

        Raises:
            NumericsError, CheckpointError: as `save`, for what shows before anything is written.
        """
        self._require_idle()
        entries = self._agree(tensors, record)
        if self._reserved:
            self._reserved.result()
        copies = self._copies.take(tensors)
        self._under_way = self._worker.submit(self._write, copies, record, entries)

    def first(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; its failure is raised on all ranks."""
        self._require_idle()
        self._peers.first(action)

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the host buffers of later `start`s in the background, so that the first one does
        not wait for memory. Not collective."""
        self._require_idle()
        self._reserved = self._worker.submit(self._copies.reserve, tensors)

    @property
    def under_way(self) -> bool:
        """Whether a `start` awaits its `finish`. Not collective."""
        return self._under_way is not None

    @property
    def finished(self) -> bool:
        """Whether `finish` would return at once; ranks may see it at different steps."""
        return self._under_way is not None and self._under_way.done()

    def finish(self) -> Saved:
        """Wait for the save under way. Not collective: peers have settled the outcome already.

        Raises:
            StorageError, CheckpointError: as `save`, on every rank.
        """
        if self._under_way is None:
            raise RuntimeError("no save is under way")
        try:
            return self._under_way.result()
        finally:
            self._under_way = None

    def newest(self) -> Found | None:
        """The newest checkpoint that verifies; None if nothing was ever saved here.

        Raises:
            CheckpointError: there are checkpoints and none verifies; names each with its reason.
        """
        self._require_idle()
        found, skipped = find_newest(self.root, self._peers)
        for step, problems in skipped.items():
            log.warning("skipping checkpoint %s: %s", storage.step_name(step), brief(problems))
        self._unusable_steps.update(skipped)
        return found

    def verify(self, path: Path) -> list[str]:
        """What is wrong with the checkpoint at `path`, empty if nothing."""
        self._require_idle()
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

        self._require_idle()

        def compare() -> None:
            check_model(found, model)
            check_entries(found, entries_of(tensors))

        self._peers.everywhere(compare)
        dcp.read(tensors, found.path, found.manifest, self._peers.group)

    def _open(self, lock_wait_seconds: float) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = storage.acquire_lock(self.root / storage.LOCK_NAME, lock_wait_seconds)
        storage.remove_leftovers(self.root)

    def _require_idle(self) -> None:
        """A save under way owns the store's group; a second user would mix up its messages."""
        if self._under_way is not None:
            raise RuntimeError("a save is under way; call finish first")

    def _agree(
        self, tensors: Mapping[str, Tensor], record: CheckpointRecord
    ) -> dict[str, TensorEntry]:
        self._peers.everywhere(lambda: _check_record(record))
        return agreed_entries(tensors, record.step, self._peers)

    def _write(
        self,
        tensors: Mapping[str, Tensor],
        record: CheckpointRecord,
        entries: dict[str, TensorEntry],
    ) -> Saved:
        begin = time.perf_counter()
        target = self.root / storage.step_name(record.step)
        partial = target.with_name(f"{target.name}.tmp")
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
            published = self._publish(partial, target, manifest, tensors)
        except (StorageError, CheckpointError):
            self._peers.first(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise
        if published:
            self._confirm(target)
            self._peers.first(lambda: self._retire(record.step))
        size_bytes = sum(entry.size_bytes for entry in manifest.files)
        return Saved(target, size_bytes, time.perf_counter() - begin)

    def _publish(
        self, partial: Path, target: Path, manifest: Manifest, tensors: Mapping[str, Tensor]
    ) -> bool:
        """Give the finished directory its name; False if an equal checkpoint has it already."""
        if self._peers.first(target.exists):
            step = manifest.record.step
            existing, problems = inspect(target, self._peers)
            if step in self._unusable_steps and not problems:
                problems = ["could not be verified when this run started"]
            if existing and not problems:
                return self._take_over(partial, Found(target, existing), manifest, tensors)
            self._peers.first(lambda: storage.move_aside(target, brief(problems)))
            self._unusable_steps.discard(step)
        self._peers.first(lambda: storage.publish(partial, target))
        return True

    def _take_over(
        self, partial: Path, existing: Found, manifest: Manifest, tensors: Mapping[str, Tensor]
    ) -> bool:
        """Give an existing checkpoint of the same values the new record; False if it has it."""
        target, old = existing.path, existing.manifest
        same = old.files == manifest.files or holds(existing, tensors, self._peers)
        if not same:
            raise CheckpointError(
                f"{target}: exists, verifies and holds other values than this run has at "
                "that step; move it away if this run shall replace it"
            )
        # Its files stay, and with them the mesh that wrote them.
        record = replace(manifest.record, mesh=old.record.mesh)
        updated = replace(old, record=record)
        changed = manifests.encode(updated) != manifests.encode(old)
        if changed:
            self._peers.first(lambda: storage.replace_manifest(partial, target, updated))
        self._peers.first(lambda: shutil.rmtree(partial))
        log.info("%s: exists already%s", target, ", given the new record" if changed else "")
        return changed

    def _confirm(self, target: Path) -> None:
        problems = verify(target, self._peers)
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
            if self._keep_every_steps and step % self._keep_every_steps == 0:
                continue
            path = self.root / storage.step_name(step)
            try:
                if manifests.read(path).record.keep:
                    continue
                storage.delete(path)
            except (OSError, CheckpointError) as error:
                log.warning("%s: not deleted: %s", path, error)


def _check_record(record: CheckpointRecord) -> None:
    if not 0 <= record.step < 10**8:
        raise CheckpointError(f"step {record.step}: a checkpoint's step has at most 8 digits")
    try:
        manifests.encode(Manifest(torch_version="", files=(), tensors={}, record=record))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"record of step {record.step}: not plain JSON: {error}") from error
