"""Newton-Schulz on the Gram matrix, symmetric products computed once; for large matrices.

A step multiplies X by a polynomial of G = X X^T, and that polynomial commutes with G. So several
steps can be taken on the small square matrix alone, G <- P G P and Q <- P Q, and X is multiplied by
their product Q at the end. All of these are symmetric: only blocks on and above the diagonal are
computed. For [n, 2n] and five steps that is 0.57 of the operations of the plain form.

G holds the squares of the singular values, the smallest of them below its rounding, and a step
multiplies that rounding by up to a^2, its polynomial's slope at zero: 12 for Muon's quintic, 66 for
the first one of Polar Express. So X is formed and a new G taken from it before that grows too far
(`runs`): after three steps of the quintic the error is the plain form's, in bf16 too; after five
of them, or three of Polar Express, matrices of low rank blow up (a largest singular value of 53,
and more than any bound). Once singular values are near 1, two steps are the most: three
err by four to seven times as much (lab log of 2026-11-22).

Legend: n rows, m columns, n <= m.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_kernels.products import product

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from zaya_kernels.newton_schulz.types import Polynomials

SMALLEST = 256
"""Rows from which the blocks are large enough to pay off."""
FIRST_RUN, FURTHER_RUNS = 3, 2
"""Most steps on the first Gram matrix, and on each further one."""
MOST_GROWTH = 200.0
"""Of a Gram matrix's rounding, before its last step; two quintics multiply it by 141."""
_BLOCKS = 8


def symmetric(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] @ b [k, n], known to be symmetric: the blocks above the diagonal, mirrored."""
    n = a.shape[0]
    out = torch.empty(n, n, dtype=a.dtype, device=a.device)
    size = max(SMALLEST // 2, -(-n // _BLOCKS))
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        part = product(a[rows], b[:, start:])
        out[rows, start:] = part
        # Turned as a whole, which torch does in tiles: four times as fast as into a slice.
        out[rows.stop :, rows] = part.t().contiguous()[rows.stop - start :]
    return out


def runs(polynomials: Polynomials) -> Iterator[Polynomials]:
    """The steps in order, cut into those of one Gram matrix each."""
    start, growth = 0, 1.0
    for step, (a, _, _) in enumerate(polynomials):
        most = FURTHER_RUNS if start else FIRST_RUN
        if step > start and (growth > MOST_GROWTH or step - start == most):
            yield polynomials[start:step]
            start, growth = step, 1.0
        growth *= a * a
    if polynomials:
        yield polynomials[start:]


def _orthogonalised(x: Tensor, polynomials: Polynomials) -> Tensor:
    """One or more steps on x [n, m] by one Gram matrix."""
    gram = symmetric(x, x.t())
    total: Tensor | None = None
    for step, (a, b, c) in enumerate(polynomials):
        polynomial = symmetric(gram, gram).mul_(c).add_(gram, alpha=b)
        polynomial.diagonal().add_(a)
        total = polynomial if total is None else symmetric(polynomial, total)
        if step + 1 < len(polynomials):
            gram = symmetric(symmetric(polynomial, gram), polynomial)
    return x if total is None else product(total, x)


def gram_form(x: Tensor, polynomials: Polynomials) -> Tensor:
    """x [n, m], n <= m, of norm 1 at most -> [n, m]."""
    for run in runs(polynomials):
        x = _orthogonalised(x, run)
    return x


def operations(n: int, m: int, polynomials: Polynomials) -> tuple[int, int]:
    """Multiply-adds of this form and of the plain one, [n, m] with n <= m."""
    size = max(SMALLEST // 2, -(-n // _BLOCKS))
    upper = sum(min(size, n - start) * (n - start) for start in range(0, n, size))
    total = 0
    for run in runs(polynomials):
        # Per step the square and, but for the last one, Q and two factors of the next G.
        total += upper * m + (4 * len(run) - 3) * upper * n + n * n * m
    return total, len(polynomials) * (2 * n * n * m + n**3)
