"""Saving while training: a refused save costs a checkpoint, not the run; several in a row end it.

A failure on one rank is a failure on all (see checkpoint.py), so all ranks count alike and decide
alike without a word more between them. What a background save came to is told at the next step
boundary of each rank, which ranks may reach before or after the outcome; anything that ends the run
therefore waits for the next save, before which every rank has collected the one under way.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from zaya_train.config.errors import LostRankError, StorageError, ZayaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from zaya_train.config.schema import CheckpointConfig
    from zaya_train.train.checkpoint import CheckpointStore, Saved
    from zaya_train.train.manifest import CheckpointRecord
    from zaya_train.train.metrics import MetricsWriter

log = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Failed saves in a row that end the run: by then a kill would cost this many intervals."""


class Saver:
    """Saves to a store and reports to the metrics; collective over all ranks.

    A context manager: leaving it waits for a save under way, except where that could not end (a
    lost rank) or a person wants out.

    sync: flushes to disk what a checkpoint counts on; called on rank 0 before every try.
    """

    def __init__(
        self,
        store: CheckpointStore,
        metrics: MetricsWriter,
        run_dir: Path,
        config: CheckpointConfig,
        sync: Callable[[], None],
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._run_dir = run_dir
        self._config = config
        self._sync = sync
        self._failures = 0
        self._started = (0, 0.0)
        """Step of the save under way, and the seconds for which it held training up."""
        self._held: ZayaError | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, LostRankError | KeyboardInterrupt) or not self._store.under_way:
            return
        step, _ = self._started
        log.info("waiting for the save of step %d before leaving", step)
        try:
            self._collect()
        except (ZayaError, RuntimeError) as late:  # of ours, or a peer's death as gloo tells it
            if error is None:
                raise
            log.error("the save of step %d failed too: %s", step, late)

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Get ready for saves of `tensors`; not collective."""
        if self._config.asynchronous:
            self._store.reserve(tensors)

    def save(self, tensors: Mapping[str, Tensor], record: CheckpointRecord, required: bool) -> None:
        """Save, or begin to; after a refusal by the file system return, and raise at the third in a
        row.

        In the background, unless the save is required or its failure would be the last: then the
        outcome must be known here. A required save (the end of a phase, a stop) is never given up
        before three tries of its own. Other errors are the store's.

        Raises:
            StorageError: on all ranks, with the last reason.
        """
        waited_seconds = self.settle()
        last_chance = self._failures + 1 >= MOST_FAILURES
        if self._config.asynchronous and not required and not last_chance:
            self._start(tensors, record, waited_seconds)
            return
        tries = MOST_FAILURES if required else 1
        for left in reversed(range(tries)):
            try:
                self._save(tensors, record)
            except StorageError as error:
                self._alarm(record.step, error)
                if not left and (required or self._failures >= MOST_FAILURES):
                    raise StorageError(
                        f"step {record.step}: {self._failures} saves in a row failed, stopped: "
                        f"{error}"
                    ) from error
            else:
                self._failures = 0
                return
            if left:
                time.sleep(self._config.retry_seconds)

    def report(self) -> None:
        """At a step boundary: tell what the save under way came to, if it has ended. Not
        collective."""
        if self._store.finished:
            try:
                self._collect()
            except ZayaError as error:
                # Peers may see it a step later: all raise it together at the next save.
                log.error("save of step %d failed: %s", self._started[0], error)
                self._held = error

    def settle(self) -> float:
        """Collect the save under way, if there is one; the seconds waited for it.

        Raises:
            CheckpointError: on all ranks, if a background save met one.
        """
        begin = time.perf_counter()
        if self._store.under_way:
            step, done = self._started[0], self._store.finished
            self._collect()
            if not done:
                log.info("waited %.1f s for the save of step %d", time.perf_counter() - begin, step)
        if self._held:
            raise self._held
        return time.perf_counter() - begin

    def _start(
        self, tensors: Mapping[str, Tensor], record: CheckpointRecord, waited_seconds: float
    ) -> None:
        begin = time.perf_counter()
        try:
            self._store.first(self._sync)
        except StorageError as error:
            self._alarm(record.step, error)
            return
        self._store.start(tensors, record)
        self._started = (record.step, waited_seconds + time.perf_counter() - begin)

    def _collect(self) -> None:
        """Take the outcome of the save under way; refusals are counted, other errors raised."""
        step, blocked_seconds = self._started
        try:
            saved = self._store.finish()
        except StorageError as error:
            self._alarm(step, error)
        else:
            self._failures = 0
            self._tell(step, saved, blocked_seconds)

    def _save(self, tensors: Mapping[str, Tensor], record: CheckpointRecord) -> None:
        begin = time.perf_counter()
        self._store.first(self._sync)
        saved = self._store.save(tensors, record)
        self._tell(record.step, saved, time.perf_counter() - begin)

    def _tell(self, step: int, saved: Saved, blocked_seconds: float) -> None:
        self._metrics.write(
            "checkpoint",
            step=step,
            path=str(saved.path.relative_to(self._run_dir)),
            seconds=saved.seconds,
            blocked_seconds=blocked_seconds,
            bytes=saved.size_bytes,
        )

    def _alarm(self, step: int, error: StorageError) -> None:
        self._failures += 1
        log.error("step %d: save failed, number %d in a row: %s", step, self._failures, error)
        self._metrics.write("save_failed", step=step, reason=str(error), in_a_row=self._failures)
