"""What a CCA operation needs besides the projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CCAWeights:
    """Parameters of one block's convolutions and key scale."""

    depthwise: Tensor
    """[C, taps]: oldest tap first, as in torch.nn.Conv1d."""
    depthwise_bias: Tensor
    """[C]."""
    grouped: Tensor
    """[H + K, d_out, d_in * taps]: a dense mix inside each head, taps innermost, oldest first."""
    grouped_bias: Tensor
    """[C]."""
    temperature: Tensor
    """[K]: learned scale of each KV head's keys."""

    def in_order(self) -> tuple[Tensor, ...]:
        """As listed above."""
        return (
            self.depthwise,
            self.depthwise_bias,
            self.grouped,
            self.grouped_bias,
            self.temperature,
        )


@dataclass(frozen=True)
class CCAContext:
    """Where each token stands, and what precedes each chunk."""

    num_query_heads: int
    positions: Tensor
    """[B, S] int64: token's position in its document, 0 at the start."""
    cos: Tensor
    """[B, S, r / 2] fp32 with r rotated channels per head (NeoX halves)."""
    sin: Tensor
    """[B, S, r / 2] fp32."""
    halo_qk: Tensor | None
    """[B, n, h, C], h >= all taps - 2: rows before each chunk; None when a row is one chunk."""
    halo_v: Tensor | None
    """[B, n, 1, K d / 2]: `v_delayed` of the token before each chunk; None as above."""
