"""Files that appear under their name only when whole."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by the JSON of `content`; StorageError leaves what was there."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def copy_folder_once(source: Path, target: Path) -> None:
    """Copy `source` to `target` unless that is there; StorageError leaves nothing half copied."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        try:
            shutil.copytree(source, partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, shutil.Error) as error:
        raise StorageError(f"{target}: cannot be copied from {source}: {error}") from error
