"""What decides a run's loss curve, kept with every attempt (RUN/run.json) and every checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from zaya_train.config.build import to_dict
from zaya_train.config.errors import ConfigError, StorageError
from zaya_train.config.kinds import math_hash
from zaya_train.runtime.files import set_aside, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zaya_train.config.schema import TrainConfig

RUN_FILE = "run.json"
"""The run's manifest: the identity of every attempt and the step it began at. Configurations lie
beside it (train.attempts)."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that can move a loss; plain JSON values."""

    math_hash: str
    config: dict[str, Any]
    corpora: dict[str, str] = field(default_factory=dict)
    """Content hash of each source that the plan draws from, by name."""
    world_size: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    """`code`, `torch` and `device` (runtime.versions)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def identity_of(
    config: TrainConfig, corpora: Mapping[str, str], world_size: int, versions: Mapping[str, str]
) -> Identity:
    """The identity of a launch."""
    return Identity(
        math_hash=math_hash(config),
        config=to_dict(config),
        corpora=dict(corpora),
        world_size=world_size,
        versions=dict(versions),
    )


def record_identity(run_dir: Path, attempt: int, step: int, identity: Identity) -> None:
    """Add attempt number `attempt`, which begins after `step`, to the run's manifest; one that is
    damaged is set aside, and the record begins anew.

    Raises:
        StorageError: the file system refused.
    """
    path = run_dir / RUN_FILE
    try:
        attempts = read_attempts(run_dir) if path.exists() else []
    except ConfigError as error:
        # As with config.json (train.attempts): no rank ends alone.
        set_aside(path, error)
        attempts = []
    values = identity.to_dict()
    del values["config"]
    write_json(path, {"attempts": [*attempts, {"attempt": attempt, "step": step, **values}]})


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """The attempts of a run's manifest; ConfigError where it is none, StorageError where it cannot
    be read."""
    path = run_dir / RUN_FILE
    try:
        attempts = json.loads(path.read_text(encoding="utf-8"))["attempts"]
        complete = all({"attempt", "step", "math_hash"} <= row.keys() for row in attempts)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a run's manifest ({error!r}); move it away") from error
    if not complete:
        raise ConfigError(f"{path}: not a run's manifest; move it away")
    return list(attempts)
