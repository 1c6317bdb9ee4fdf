"""Newton-Schulz orthogonalisation for Muon.

Every step applies one odd quintic to the singular values of the input, scaled into [0, 1]; which
ones is the caller's affair. Those of Jordan et al. (kellerjordan.github.io/posts/muon) drive them
towards 1 within about +-0.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_kernels.backends import pick
from zaya_kernels.newton_schulz.eager import newton_schulz_eager, newton_schulz_gram
from zaya_kernels.newton_schulz.reference import newton_schulz_reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from zaya_kernels.newton_schulz.types import Polynomials

QUINTIC = (3.4445, -4.7750, 2.0315)
FIVE_QUINTICS = (QUINTIC,) * 5
"""Muon as published."""


def _newton_schulz_triton(matrices: Tensor, polynomials: Polynomials, dtype: torch.dtype) -> Tensor:
    from zaya_kernels.newton_schulz.triton import newton_schulz_triton

    return newton_schulz_triton(matrices, polynomials, dtype)


BACKENDS = {
    "eager": newton_schulz_eager,
    "gram": newton_schulz_gram,
    "reference": newton_schulz_reference,
    "triton": _newton_schulz_triton,
}


def newton_schulz(
    matrices: Tensor, polynomials: Polynomials, dtype: torch.dtype, backend: str
) -> Tensor:
    """matrices [N, n, m] -> approximately orthogonal [N, n, m] in fp32, after one step for each of
    `polynomials`; products run in `dtype`.

    An all-zero matrix stays zero.
    """
    return pick("newton_schulz", BACKENDS, backend)(matrices, polynomials, dtype)
