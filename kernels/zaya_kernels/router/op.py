"""MLP router with exponential depth averaging and biased top-1 choice (2605.05365, II-A2).

r = down x + b + gamma r_previous;  s = softmax(out gelu(fc2 gelu(fc1 RMSNorm(r) + b) + b));
choice = argmax(s + balancing). The latent, the MLP and the softmax are fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_kernels.backends import pick
from zaya_kernels.router.eager import router_eager
from zaya_kernels.router.native import router_native
from zaya_kernels.router.reference import router_reference
from zaya_kernels.router.types import Routed, RouterContext, RouterWeights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Routed", "RouterContext", "RouterWeights", "router"]


def _triton(
    x: Tensor, previous: Tensor | None, weights: RouterWeights, context: RouterContext
) -> Routed:
    from zaya_kernels.router.triton import router_triton

    return router_triton(x, previous, weights, context)


BACKENDS = {
    "eager": router_eager,
    "native": router_native,
    "reference": router_reference,
    "triton": _triton,
}


def router(
    x: Tensor,
    previous: Tensor | None,
    weights: RouterWeights,
    context: RouterContext,
    backend: str,
) -> Routed:
    """x [B, S, D] normalised, previous [B, S, R] state of the layer before, or None."""
    return pick("router", BACKENDS, backend)(x, previous, weights, context)
