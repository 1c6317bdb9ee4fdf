"""Arguments of the experts' MLP.

Legend: E experts, D hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MainGradients:
    """Gradients in fp32 that a backward pass adds to, instead of handing one to autograd."""

    gate_up: Tensor
    """[E, 2F, D]."""
    down: Tensor
    """[E, D, F]."""
