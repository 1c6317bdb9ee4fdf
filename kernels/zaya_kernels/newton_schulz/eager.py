"""Batched Newton-Schulz over equal shapes, on the smaller side's Gram matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_kernels.newton_schulz.gram import newton_schulz_gram, pays_off
from zaya_kernels.products import batched_product, batched_sum

if TYPE_CHECKING:
    from torch import Tensor


def newton_schulz_eager(
    matrices: Tensor, steps: int, dtype: torch.dtype, coefficients: tuple[float, float, float]
) -> Tensor:
    """See `zaya_kernels.newton_schulz.op.newton_schulz`."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    x = (x / norm).to(dtype)
    if pays_off(x):
        x = torch.stack([newton_schulz_gram(matrix, steps, coefficients) for matrix in x])
        steps = 0
    for _ in range(steps):
        gram = batched_product(x, x.transpose(1, 2))
        polynomial = batched_sum(gram, gram, gram, beta=b, alpha=c)
        x = batched_sum(x, polynomial, x, beta=a)
    out = x.transpose(1, 2) if tall else x
    return out.to(torch.promote_types(dtype, torch.float32))
