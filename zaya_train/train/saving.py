"""Saving while training: a refused save costs a checkpoint, not the run; several in a row end it.

A failure on one rank is a failure on all (see checkpoint.py), so all ranks count alike and decide
alike without a word more between them.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from zaya_train.config.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from zaya_train.train.checkpoint import CheckpointStore
    from zaya_train.train.manifest import CheckpointRecord
    from zaya_train.train.metrics import MetricsWriter

log = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Failed saves in a row that end the run: by then a kill would cost this many intervals."""


class Saver:
    """Saves to a store and reports to the metrics; collective over all ranks.

    retry_seconds: wait before a save that is required is tried again.
    """

    def __init__(
        self, store: CheckpointStore, metrics: MetricsWriter, run_dir: Path, retry_seconds: float
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._run_dir = run_dir
        self._retry_seconds = retry_seconds
        self._failures = 0

    def save(self, tensors: Mapping[str, Tensor], record: CheckpointRecord, required: bool) -> None:
        """Save; after a refusal by the file system return, and raise at the third in a row.

        A required save (the end of a phase, a stop) is never given up before three tries of its
        own. Other errors are the store's.

        Raises:
            StorageError: on all ranks, with the last reason.
        """
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
                time.sleep(self._retry_seconds)

    def _save(self, tensors: Mapping[str, Tensor], record: CheckpointRecord) -> None:
        begin = time.perf_counter()
        path = self._store.save(tensors, record)
        self._metrics.write(
            "checkpoint",
            step=record.step,
            path=str(path.relative_to(self._run_dir)),
            seconds=time.perf_counter() - begin,
            bytes=_directory_bytes(path) if dist.get_rank() == 0 else 0,
        )

    def _alarm(self, step: int, error: StorageError) -> None:
        self._failures += 1
        log.error("step %d: save failed, number %d in a row: %s", step, self._failures, error)
        self._metrics.write("save_failed", step=step, reason=str(error), in_a_row=self._failures)


def _directory_bytes(path: Path) -> int:
    """One rank's business: a thousand ranks would stat a thousand files each."""
    return sum(file.stat().st_size for file in path.iterdir())
