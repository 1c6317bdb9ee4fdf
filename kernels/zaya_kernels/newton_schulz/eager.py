"""Batched Newton-Schulz over equal shapes, on the smaller side's Gram matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_kernels.newton_schulz.gram import SMALLEST, gram_form
from zaya_kernels.products import batched_product, batched_sum

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def newton_schulz_eager(
    matrices: Tensor, steps: int, dtype: torch.dtype, coefficients: tuple[float, float, float]
) -> Tensor:
    """See `zaya_kernels.newton_schulz.op.newton_schulz`; all matrices in one batched product."""
    return _oriented(matrices, dtype, lambda x: _plain(x, steps, coefficients))


def newton_schulz_gram(
    matrices: Tensor, steps: int, dtype: torch.dtype, coefficients: tuple[float, float, float]
) -> Tensor:
    """See `zaya_kernels.newton_schulz.op.newton_schulz`; on the Gram matrix, one matrix after the
    other, which pays from `gram.SMALLEST` rows on: smaller ones take the plain form."""

    def form(x: Tensor) -> Tensor:
        if x.shape[1] < SMALLEST:
            return _plain(x, steps, coefficients)
        return torch.stack([gram_form(matrix, steps, coefficients) for matrix in x])

    return _oriented(matrices, dtype, form)


def _oriented(matrices: Tensor, dtype: torch.dtype, form: Callable[[Tensor], Tensor]) -> Tensor:
    """`form` on matrices [N, n, m] of norm 1, turned so that n <= m."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    x = (x / norm).to(dtype)
    out = form(x)
    out = out.transpose(1, 2) if tall else out
    return out.to(torch.promote_types(dtype, torch.float32))


def _plain(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        gram = batched_product(x, x.transpose(1, 2))
        polynomial = batched_sum(gram, gram, gram, beta=b, alpha=c)
        x = batched_sum(x, polynomial, x, beta=a)
    return x
