"""Counting without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def count_classes(choice: Tensor, num_classes: int, counted: Tensor | None = None) -> Tensor:
    """choice of any shape, int64 below num_classes -> [num_classes] int64: how often each occurs,
    where `counted` (bool, same shape) says so. bincount would wait for the device for its size."""
    flat = choice.flatten()
    ones = torch.ones_like(flat) if counted is None else counted.flatten().to(flat.dtype)
    return torch.zeros(num_classes, dtype=flat.dtype, device=flat.device).scatter_add_(
        0, flat, ones
    )
