"""What goes into and comes out of the router.

Legend: B batch, S sequence, D hidden, R router width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RouterWeights:
    """Parameters of one layer's router, any floating-point type."""

    down: Tensor
    """[R, D]."""
    down_bias: Tensor
    """[R]."""
    depth_scale: Tensor | None
    """[R]; None in the first layer, which has no earlier router to average with."""
    norm: Tensor
    """[R]."""
    fc1: Tensor
    """[R, R]."""
    fc1_bias: Tensor
    fc2: Tensor
    """[R, R]."""
    fc2_bias: Tensor
    out: Tensor
    """[C, R]."""


@dataclass(frozen=True)
class RouterContext:
    """What the choice depends on besides the weights; no gradient goes there."""

    balancing: Tensor
    """[C] added to the probabilities for the choice only."""
    valid: Tensor
    """[B, S] bool: tokens that count as load."""
    eps: float
    choice: Tensor | None = None
    """[B, S] int64 to take instead of a new one, when a pass is made again."""
    load: Tensor | None = None
    """[C] that belongs to `choice`."""


@dataclass(frozen=True)
class Routed:
    """A forward pass's routing."""

    choice: Tensor
    """[B, S] int64 class of each token."""
    probability: Tensor
    """[B, S] fp32 unbiased probability of the choice; the only path of gradients to the MLP."""
    state: Tensor
    """[B, S, R] fp32 latent after averaging, input of the next layer's router."""
    load: Tensor
    """[C] fp32 count of valid tokens per class."""
