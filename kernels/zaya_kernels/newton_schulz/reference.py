"""Readable Newton-Schulz iteration, one matrix at a time, any precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def newton_schulz_reference(
    matrices: Tensor, steps: int, dtype: torch.dtype, coefficients: tuple[float, float, float]
) -> Tensor:
    """See `zaya_kernels.newton_schulz.op.newton_schulz`."""
    a, b, c = coefficients
    results = []
    for matrix in matrices:
        x = matrix.to(dtype)
        x = x / x.norm().clamp_min(1e-7)
        for _ in range(steps):
            gram = x @ x.t()
            x = a * x + (b * gram + c * gram @ gram) @ x
        results.append(x)
    out = torch.stack(results)
    return out.to(torch.promote_types(dtype, torch.float32))
