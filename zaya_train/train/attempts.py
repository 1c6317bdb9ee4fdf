"""The configuration of every attempt at a run, and what changed from one to the next.

run.json                     every attempt's identity (train.identity)
config.json                  the newest attempt's
configs/attempt-0001.json    each attempt's, numbered as in metrics.jsonl
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zaya_train.config.build import to_dict
from zaya_train.config.derive import config_hash
from zaya_train.config.diff import differences
from zaya_train.config.errors import ConfigError, StorageError
from zaya_train.runtime.files import set_aside, write_json
from zaya_train.train.identity import record_identity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from zaya_train.config.schema import TrainConfig
    from zaya_train.train.identity import Identity
    from zaya_train.train.metrics import MetricsWriter

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
CONFIG_DIR = "configs"


@dataclass(frozen=True)
class Attempt:
    """What this process writes about taking up the run."""

    config: TrainConfig
    identity: Identity
    run_dir: Path
    metrics: MetricsWriter
    rank: int
    device: torch.device

    def announce(self, step: int, start: Path | None, own: bool) -> None:
        """Record this attempt, once nothing speaks against it, and what it changed.

        Args:
            step: done so far.
            start: the checkpoint it goes on from, if any.
            own: that is one of this run.
        """
        changed = {}
        if self.rank == 0:
            values = to_dict(self.config)
            changed = record_attempt(self.run_dir, self.metrics.attempt, values)
            record_identity(self.run_dir, self.metrics.attempt, step, self.identity)
        for key, (old, new) in changed.items():
            log.warning(
                "configuration changed since the attempt before: %s: %s -> %s", key, old, new
            )
        self._row(
            "resume" if own else "start",
            step,
            config_changes=changed,
            **({"branched_from": str(start)} if start and not own else {}),
        )
        if start:
            log.info("%s step %d from %s", "resuming at" if own else "branching at", step, start)

    def rolled_back(self, step: int, rows: tuple[int, int]) -> None:
        """Rows of the metrics behind `step` no longer count; `rows` will be passed over."""
        self._row("resume", step, rolled_back=list(rows))
        log.warning("rolled back to step %d; will pass over rows %d to %d", step, rows[0], rows[1])

    def _row(self, kind: str, step: int, **values: Any) -> None:
        facts = {
            "world_size": self.identity.world_size,
            "device": str(self.device),
            "config_hash": config_hash(self.config),
            "math_hash": self.identity.math_hash,
        }
        self.metrics.write(kind, step=step, **facts, **values)


def record_attempt(
    run_dir: Path, attempt: int, config: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Keep the configuration of attempt number `attempt` as the newest and under its number.

    For one rank. Returns dotted key -> (old value, new value) of what changed since the attempt
    before; nothing on the first, or where config.json is no configuration and is set aside.

    Raises:
        StorageError: the file system refused.
    """
    newest = run_dir / CONFIG_FILE
    try:
        changed = differences(read_config(newest), config) if newest.exists() else {}
    except ConfigError as error:
        # To end here would end this rank alone, its peers being on their way into collectives.
        set_aside(newest, error)
        changed = {}
    write_json(run_dir / CONFIG_DIR / f"attempt-{attempt:04d}.json", config)
    write_json(newest, config)
    return changed


def newest_config(run_dir: Path) -> dict[str, Any]:
    """The configuration of the newest attempt, empty where there is none that can be read."""
    try:
        return read_config(run_dir / CONFIG_FILE)
    except (ConfigError, StorageError):
        return {}


def read_config(path: Path) -> dict[str, Any]:
    """A kept configuration; ConfigError where it is none, StorageError where it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); move it away to go on") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a configuration; move it away to go on")
    return values
