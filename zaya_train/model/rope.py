"""Rotary position embedding on part of each head's channels (2605.05365, II-A)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def rotary_tables(positions: Tensor, base: float, rotated_channels: int) -> tuple[Tensor, Tensor]:
    """positions [B, S] -> cos, sin [B, S, rotated_channels / 2] fp32.

    Angles are formed in fp32 from fp32 inverse frequencies, as transformers' `zaya` does.
    """
    exponent = torch.arange(0, rotated_channels, 2, dtype=torch.float32, device=positions.device)
    inverse_frequency = 1.0 / (base ** (exponent / rotated_channels))
    angles = positions.unsqueeze(-1).float() * inverse_frequency
    return angles.cos(), angles.sin()
