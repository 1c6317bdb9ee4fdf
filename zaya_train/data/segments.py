"""A conversation in text, cut where its sections begin and end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zaya_train.data.sections import Kind, Role


@dataclass(frozen=True)
class Segment:
    """A stretch of one turn; `text` of a MARKUP segment is the format's own, such as a marker."""

    text: str
    role: Role
    kind: Kind
    turn: int
    supervised: bool
