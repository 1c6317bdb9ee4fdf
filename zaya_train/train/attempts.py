"""The configuration of every attempt at a run, and what changed from one to the next.

config.json                  the newest attempt's
configs/attempt-0001.json    each attempt's, numbered as in metrics.jsonl
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from zaya_train.config.diff import differences
from zaya_train.config.errors import ConfigError, StorageError
from zaya_train.runtime.files import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG_FILE = "config.json"
CONFIG_DIR = "configs"


def record_attempt(
    run_dir: Path, attempt: int, config: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Keep the configuration of attempt number `attempt` as the newest and under its number.

    For one rank. Returns dotted key -> (old value, new value) of what changed since the attempt
    before; nothing on the first.

    Raises:
        ConfigError: config.json is there and is no configuration.
        StorageError: the file system refused.
    """
    newest = run_dir / CONFIG_FILE
    changed = differences(_read(newest), config) if newest.exists() else {}
    write_json(run_dir / CONFIG_DIR / f"attempt-{attempt:04d}.json", config)
    write_json(newest, config)
    return changed


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); move it away to go on") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a configuration; move it away to go on")
    return values
