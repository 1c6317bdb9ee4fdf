"""Readable router, any precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import gelu

from zaya_kernels.norm_residual.reference import rms_norm_reference
from zaya_kernels.router.eager import chosen
from zaya_kernels.router.types import Routed

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.router.types import RouterContext, RouterWeights


def router_probabilities(
    x: Tensor, previous: Tensor | None, weights: RouterWeights, eps: float
) -> tuple[Tensor, Tensor]:
    """Router state [..., R] and probabilities [..., C] before any bias."""
    work = torch.promote_types(x.dtype, torch.float32)
    state = (x @ weights.down.t() + weights.down_bias).to(work)
    if weights.depth_scale is not None and previous is not None:
        state = state + previous * weights.depth_scale.to(work)
    h = rms_norm_reference(state, weights.norm.to(work), eps)
    h = gelu(h @ weights.fc1.to(work).t() + weights.fc1_bias.to(work))
    h = gelu(h @ weights.fc2.to(work).t() + weights.fc2_bias.to(work))
    return state, torch.softmax(h @ weights.out.to(work).t(), dim=-1)


def router_reference(
    x: Tensor, previous: Tensor | None, weights: RouterWeights, context: RouterContext
) -> Routed:
    """See `zaya_kernels.router.op.router`."""
    state, probabilities = router_probabilities(x, previous, weights, context.eps)
    choice, load = chosen(probabilities, context)
    probability = probabilities.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    # A state of its own: it leaves the layer, and an output must not be a view.
    return Routed(choice, probability, state.clone(), load)
