"""Compressed Convolutional Attention up to the attention core (arXiv 2510.04476; 2605.05365, II-A).

From the down-projections to rotated, normalised q, k and shifted v, in one operation.

Legend: B batch, S local sequence, H query heads, K KV heads, d head dim, C = (H + K) d,
n local chunks of L = S / n tokens, h halo rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_kernels.backends import pick
from zaya_kernels.cca.eager import cca_eager
from zaya_kernels.cca.native import cca_native
from zaya_kernels.cca.reference import cca_reference
from zaya_kernels.cca.types import CCAContext, CCAWeights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BACKENDS", "CCAContext", "CCAWeights", "Projections", "cca"]


def _cca_triton(
    qk: Tensor, v_now: Tensor, v_delayed: Tensor, weights: CCAWeights, context: CCAContext
) -> tuple[Tensor, Tensor, Tensor]:
    from zaya_kernels.cca.triton import cca_triton

    return cca_triton(qk, v_now, v_delayed, weights, context)


BACKENDS = {
    "eager": cca_eager,
    "native": cca_native,
    "reference": cca_reference,
    "triton": _cca_triton,
}


@dataclass(frozen=True)
class Projections:
    """Down-projected inputs of one block."""

    qk: Tensor
    """[B, S, C]: queries of all heads, then keys of all heads."""
    v_now: Tensor
    """[B, S, K d / 2]: value channels taken from this token."""
    v_delayed: Tensor
    """[B, S, K d / 2]: value channels that the next token will use."""


def cca(
    inputs: Projections, weights: CCAWeights, context: CCAContext, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, S, H, d], keys and values [B, S, K, d] in the dtype of `inputs.qk`.

    Convolutions, QK-mean, QK-norm and rotation are computed in fp32 (2605.05365, II-A) or in the
    inputs' precision where that is higher. Nothing crosses a document boundary.
    """
    run = pick("cca", BACKENDS, backend)
    return run(inputs.qk, inputs.v_now, inputs.v_delayed, weights, context)
