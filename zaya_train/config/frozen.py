"""A configuration composed once, on the machine that submits: ranks read the file and compose
nothing, so that a job requeued months later is the job that was submitted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from zaya_train.config.build import build, to_dict
from zaya_train.config.derive import config_hash
from zaya_train.config.errors import ConfigError
from zaya_train.config.schema import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path


def frozen(config: TrainConfig) -> dict[str, Any]:
    """The content of a frozen file: the configuration and its hash."""
    return {"config_hash": config_hash(config), "config": to_dict(config)}


def thaw(path: Path) -> TrainConfig:
    """The configuration of a frozen file.

    Raises:
        ConfigError: not there, not JSON, not a configuration, or edited since it was frozen.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--frozen {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--frozen {path}: not JSON: {error}") from error
    if not isinstance(content, dict) or set(content) != {"config_hash", "config"}:
        raise ConfigError(f"--frozen {path}: not a file that zaya submit wrote")
    config = build(TrainConfig, content["config"])
    if (now := config_hash(config)) != content["config_hash"]:
        raise ConfigError(
            f"--frozen {path}: was edited, or is of another version: it holds configuration {now} "
            f"and says {content['config_hash']}; submit again instead"
        )
    return config
