"""Newton-Schulz on the Gram matrix, symmetric products computed once; for large matrices.

A step multiplies X by a polynomial of G = X X^T, and that polynomial commutes with G. So several
steps can be taken on the small square matrix alone, G <- P G P and Q <- P Q, and X is multiplied by
their product Q at the end. All of these are symmetric: only blocks on and above the diagonal are
computed. For [n, 2n] and five steps that is 0.57 of the operations of the plain form.

G holds the squares of the singular values, the smallest of them below its rounding, and every step
multiplies that rounding by up to 12. After `RESTART` steps X is formed and a new G taken from it:
with 3 the error is the plain form's, in bf16 too; with 5 matrices of low rank blow up (a largest
singular value of 53 in bf16).

Legend: n rows, m columns, n <= m.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_kernels.products import product

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 256
"""Rows from which the blocks are large enough to pay off."""
RESTART = 3
"""Steps on one Gram matrix."""
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


def _orthogonalised(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """`steps` steps on x [n, m] by one Gram matrix."""
    a, b, c = coefficients
    gram = symmetric(x, x.t())
    total: Tensor | None = None
    for step in range(steps):
        polynomial = symmetric(gram, gram).mul_(c).add_(gram, alpha=b)
        polynomial.diagonal().add_(a)
        total = polynomial if total is None else symmetric(polynomial, total)
        if step + 1 < steps:
            gram = symmetric(symmetric(polynomial, gram), polynomial)
    return x if total is None else product(total, x)


def gram_form(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """x [n, m], n <= m, of norm 1 at most -> [n, m]."""
    for start in range(0, steps, RESTART):
        x = _orthogonalised(x, min(RESTART, steps - start), coefficients)
    return x


def operations(n: int, m: int, steps: int) -> tuple[int, int]:
    """Multiply-adds of this form and of the plain one, [n, m] with n <= m."""
    size = max(SMALLEST // 2, -(-n // _BLOCKS))
    upper = sum(min(size, n - start) * (n - start) for start in range(0, n, size))
    total = 0
    for start in range(0, steps, RESTART):
        count = min(RESTART, steps - start)
        # Per step the square and, but for the last one, Q and two factors of the next G.
        total += upper * m + (4 * count - 3) * upper * n + n * n * m
    return total, steps * (2 * n * n * m + n**3)
