"""What `zaya diff` compares: a run, a checkpoint or a configuration, brought to one form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zaya_train.config.build import build
from zaya_train.config.derive import sources_drawn
from zaya_train.config.errors import CheckpointError, ConfigError, DataError
from zaya_train.config.kinds import math_hash
from zaya_train.config.schema import TrainConfig
from zaya_train.data.corpus import read_manifest
from zaya_train.train import manifest as manifests
from zaya_train.train.attempts import CONFIG_DIR, CONFIG_FILE, read_config
from zaya_train.train.identity import RUN_FILE, Identity, read_attempts


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    path: Path
    segments: tuple[tuple[int, Identity], ...]
    """(step behind which it holds, identity), ascending: an attempt each, those left out that later
    ones rolled back whole. From 0, or where the attempts before were not recorded, from there."""

    def at(self, step: int) -> Identity:
        """What decides the steps right behind `step`, which is not before the first segment."""
        return [identity for start, identity in self.segments if start <= step][-1]


def load_side(path: Path) -> Side:
    """The run, checkpoint or configuration at `path`.

    Raises:
        ConfigError: it is none of these, or a configuration of another version.
        CheckpointError: a checkpoint whose manifest is damaged or that records no identity.
        StorageError: a file cannot be read.
    """
    if path.is_file():
        return Side(path, ((0, _of_config(_unfrozen(read_config(path)))),))
    if (path / manifests.MANIFEST_NAME).is_file():
        return Side(path, ((0, _of_checkpoint(path)),))
    if (path / RUN_FILE).is_file():
        return Side(path, _of_attempts(path))
    if (path / CONFIG_FILE).is_file():
        return Side(path, ((0, _of_config(read_config(path / CONFIG_FILE))),))
    raise ConfigError(f"{path}: no run, no checkpoint and no configuration")


def _of_config(values: dict[str, Any]) -> Identity:
    """Of a configuration alone: what its corpora hold now, if they are here; nothing of versions
    and ranks."""
    config = build(TrainConfig, values)
    corpora = {}
    for name in sources_drawn(config.plan.phases.values()):
        try:
            corpora[name] = read_manifest(Path(config.data.sources[name].path)).content_sha256
        except (DataError, KeyError):
            continue
    return Identity(math_hash=math_hash(config), config=values, corpora=corpora)


def _unfrozen(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a file that `zaya submit` froze, or in one that a run kept."""
    if set(values) == {"config_hash", "config"}:
        inner: dict[str, Any] = values["config"]
        return inner
    return values


def _of_checkpoint(path: Path) -> Identity:
    identity = manifests.read(path).record.identity
    if not identity:
        raise CheckpointError(
            f"{path}: written by a version that kept no identity; compare the runs instead"
        )
    return Identity(**identity)


def _of_attempts(run_dir: Path) -> tuple[tuple[int, Identity], ...]:
    attempts = read_attempts(run_dir)
    segments: list[tuple[int, Identity]] = []
    for values in attempts:
        step = values["step"]
        config = read_config(run_dir / CONFIG_DIR / f"attempt-{values['attempt']:04d}.json")
        kept = {k: v for k, v in values.items() if k not in ("step", "attempt")}
        segments = [segment for segment in segments if segment[0] < step]
        segments.append((step, Identity(config=config, **kept)))
    if not segments:
        raise ConfigError(f"{run_dir / RUN_FILE}: names no attempt")
    if attempts[0]["attempt"] == 1:
        # A branch begins behind step 0, and what is before it is another run's.
        segments[0] = (0, segments[0][1])
    return tuple(segments)
