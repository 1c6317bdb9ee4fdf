"""Where tokens go.

Legend: T tokens, E experts, C = E + 1 classes, the last of which has no expert, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Load:
    """How many tokens chose each class; all on the tokens' device."""

    choice: Tensor
    """[T] int64."""
    counts: Tensor
    """[C] int64."""
    backend: str
    """Who counted, and will sort and move."""
    starts: Tensor | None = None
    """triton: [blocks, C padded] int32, place of each block's first token of each class."""


@dataclass(frozen=True)
class Order:
    """Tokens sorted by class, those of one class in their own order; on the tokens' device."""

    order: Tensor
    """[T] int64: token at each place."""
    counts: Tensor
    """[C] int64."""
    backend: str
    known: int | None = None
    """Tokens with an expert, if the host knows the number; without it rows are as many as tokens,
    those beyond the counts neither read nor written."""

    @property
    def num_rows(self) -> int:
        return self.order.numel() if self.known is None else self.known
