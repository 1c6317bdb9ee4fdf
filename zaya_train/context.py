"""What all parts of a training run work with, as long as its process lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from zaya_train.config.derive import Layout
    from zaya_train.config.schema import TrainConfig
    from zaya_train.data.ledger import LedgerWriter
    from zaya_train.parallel.mesh import Mesh
    from zaya_train.runtime.dist import Ranks
    from zaya_train.runtime.heartbeat import Heartbeat
    from zaya_train.runtime.peaks import Peaks
    from zaya_train.runtime.replays import Replays
    from zaya_train.runtime.signals import StopFlag
    from zaya_train.train.attempts import Attempt
    from zaya_train.train.checkpoint import CheckpointStore
    from zaya_train.train.guard import Incidents
    from zaya_train.train.metrics import MetricsWriter
    from zaya_train.train.saving import Saver


@dataclass(frozen=True)
class Context:
    """What lives as long as the process."""

    config: TrainConfig
    ranks: Ranks
    run_dir: Path
    console: Console
    store: CheckpointStore
    saver: Saver
    metrics: MetricsWriter
    flag: StopFlag
    corpora: dict[str, str]
    """Content hash of each source by name."""
    meshes: dict[Layout, Mesh]
    """Made so far: every new mesh makes process groups, which live as long as the process."""
    ledger: LedgerWriter
    heartbeat: Heartbeat
    incidents: Incidents
    attempt: Attempt
    replays: Replays
    peaks: Peaks
