"""Router in torch; the norm's backward is hand-written (`norm_residual.eager`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import gelu

from zaya_kernels.counts import count_classes
from zaya_kernels.norm_residual.eager import rms_norm_eager
from zaya_kernels.products import linear
from zaya_kernels.router.types import Routed

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.router.types import RouterContext, RouterWeights


def router_eager(
    x: Tensor, previous: Tensor | None, weights: RouterWeights, context: RouterContext
) -> Routed:
    """See `zaya_kernels.router.op.router`."""
    work = torch.promote_types(x.dtype, torch.float32)
    state = linear(x, weights.down, weights.down_bias).to(work)
    if weights.depth_scale is not None and previous is not None:
        state = torch.addcmul(state, previous, weights.depth_scale.to(work))
    else:
        # Leaves the layer as an output of its own: FSDP hooks outputs, and a view of the product
        # (which `linear` gives) would make it warn about wrong gradients.
        state = state.clone()
    probabilities = _scores(state, weights, context.eps).softmax(dim=-1)
    choice, load = chosen(probabilities, context)
    probability = probabilities.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    return Routed(choice, probability, state, load)


def _scores(state: Tensor, weights: RouterWeights, eps: float) -> Tensor:
    """[B, S, R] -> [B, S, C], fp32 or higher."""
    dtype = state.dtype
    h = rms_norm_eager(state, weights.norm.to(dtype), eps)
    h = gelu(linear(h, weights.fc1.to(dtype), weights.fc1_bias.to(dtype)))
    h = gelu(linear(h, weights.fc2.to(dtype), weights.fc2_bias.to(dtype)))
    return linear(h, weights.out.to(dtype))


def chosen(probabilities: Tensor, context: RouterContext) -> tuple[Tensor, Tensor]:
    """probabilities [B, S, C] -> choice [B, S] and load [C]: the context's if it holds both."""
    if context.choice is not None and context.load is not None:
        return context.choice, context.load
    with torch.no_grad():
        choice = (probabilities + context.balancing).argmax(dim=-1)
        load = count_classes(choice, probabilities.shape[-1], context.valid).float()
    return choice, load
