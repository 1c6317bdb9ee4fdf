"""Batched Newton-Schulz over equal shapes, on the smaller side's Gram matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_kernels.newton_schulz.gram import SMALLEST, gram_form
from zaya_kernels.products import batched_product, batched_sum
from zaya_kernels.threads import over_matrices

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.newton_schulz.types import Polynomials


def newton_schulz_eager(matrices: Tensor, polynomials: Polynomials, dtype: torch.dtype) -> Tensor:
    """See `zaya_kernels.newton_schulz.op.newton_schulz`; all matrices in one batched product."""
    x, tall = _scaled(matrices, dtype)
    for a, b, c in polynomials:
        gram = batched_product(x, x.transpose(1, 2))
        polynomial = batched_sum(gram, gram, gram, beta=b, alpha=c)
        x = batched_sum(x, polynomial, x, beta=a)
    return _returned(x, tall)


def newton_schulz_gram(matrices: Tensor, polynomials: Polynomials, dtype: torch.dtype) -> Tensor:
    """See `zaya_kernels.newton_schulz.op.newton_schulz`; on the Gram matrix, each matrix by
    itself and on a CPU as many at once as there are threads. It pays from `gram.SMALLEST` rows on:
    smaller ones take the plain form."""
    if min(matrices.shape[1:]) < SMALLEST:
        return newton_schulz_eager(matrices, polynomials, dtype)
    x, tall = _scaled(matrices, dtype)
    done = over_matrices(lambda matrix: gram_form(matrix, polynomials), x)
    return _returned(torch.stack(done), tall)


def _scaled(matrices: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """[N, n, m] of norm 1, turned so that n <= m, and whether they were."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    return (x / norm).to(dtype), tall


def _returned(x: Tensor, tall: bool) -> Tensor:
    out = x.transpose(1, 2) if tall else x
    return out.to(torch.promote_types(x.dtype, torch.float32))
