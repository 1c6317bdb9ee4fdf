"""How one layout's config.json says what our ModelConfig says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from zaya_train.config.schema import ModelConfig


@dataclass(frozen=True)
class Dialect:
    """Keys of one layout's config.json."""

    marks: tuple[str, ...]
    """Keys that the other layout does not have."""
    same: Mapping[str, str]
    """Our field -> the key with the same value."""
    places: Mapping[str, str]
    """Our field -> key, for messages, where the value has another form."""
    fixed: Mapping[str, Any]
    """Keys of which one value is supported; written always, taken as that where left out."""
    defaults: Mapping[str, Any]
    """Values of `same` by their key, for files that leave keys out."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Keys besides `same` and `fixed`."""
    read: Callable[[Path, Mapping[str, Any]], dict[str, Any]]
    """Fields besides `same`, of the file named for messages. CheckpointError for what this model
    cannot honour."""
    skip_output: Literal["identity", "zero"]
    """What the layout's own code computes for a skipped token; the file does not say."""
