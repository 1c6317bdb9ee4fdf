"""The router in C: products and what stands between them, block by block (native/router.c).

Saved for backward: inputs, latent, both pre-activations, probabilities, one number per row, as in
triton.py. Weights' gradients are summed over at most four parts of the tokens, so that threads do
not change them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from zaya_kernels.counts import count_classes
from zaya_kernels.native.library import TYPES, call, check, check_shape
from zaya_kernels.router.types import Routed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zaya_kernels.router.types import RouterContext, RouterWeights

_PARTS = 4
_VECTORS = 5
"""Rows of sums in router.c."""


class _Router(torch.autograd.Function):
    """Weights are down, its bias, depth scale, norm, fc1, its bias, fc2, its bias, out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        previous: Tensor | None,
        context: RouterContext,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x, previous = x.contiguous(), None if previous is None else previous.contiguous()
        batch, given = x.shape[:-1], context.choice
        shape, inputs = _arguments(x, previous, weights, context.eps)
        width, classes = int(shape[2]), int(shape[3])
        state, z1, z2 = (torch.empty(*batch, width, dtype=torch.float32) for _ in range(3))
        rstd, probability = (torch.empty(batch, dtype=torch.float32) for _ in range(2))
        probabilities = torch.empty(*batch, classes, dtype=torch.float32)
        choice = torch.empty(batch, dtype=torch.int64) if given is None else given.long()
        choice = choice.contiguous()
        kept = (state, rstd, z1, z2, probabilities, choice)
        balancing = None if given is not None else context.balancing.float().contiguous()
        call("zaya_router", shape, inputs, kept, balancing, probability)
        ctx.save_for_backward(x, previous, *kept, *weights)
        ctx.mark_non_differentiable(choice)
        return probability, state, choice

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_state: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        x, previous, *rest = ctx.saved_tensors
        kept, weights = tuple(rest[:6]), rest[6:]
        shape, inputs = _arguments(x, previous, weights, 0.0)
        hidden, width, classes, parts = (int(shape[i]) for i in (1, 2, 3, 6))
        to_x = torch.empty_like(x)
        to_previous = None if previous is None else torch.empty_like(previous)
        matrices = [
            torch.empty(parts, *size, dtype=torch.float32)
            for size in ((width, hidden), (width, width), (width, width), (classes, width))
        ]
        sums = torch.zeros(parts, _VECTORS, width, dtype=torch.float64)
        given = (g if g is None else g.contiguous() for g in (grad, grad_state))
        gradients = (*given, to_x, to_previous, *matrices, sums)
        call("zaya_router_backward", shape, inputs, kept, gradients)
        down, fc1, fc2, out = (m.sum(0) for m in matrices)
        down_bias, depth, norm, fc1_bias, fc2_bias = sums.sum(0)
        norm_weight = inputs[5]
        assert norm_weight is not None
        found = (
            *(down, down_bias, None if previous is None else depth, norm),
            *(fc1.mul_(norm_weight), fc1_bias, fc2, fc2_bias, out),
        )
        in_type = (
            None if g is None or w is None else g.to(w.dtype)
            for g, w in zip(found, weights, strict=True)
        )
        return to_x, to_previous, None, *in_type


def _arguments(
    x: Tensor, previous: Tensor | None, weights: Sequence[Tensor | None], eps: float
) -> tuple[tuple[int | float, ...], tuple[Tensor | None, ...]]:
    """`Shape` and `Inputs` of router.c."""
    down, last = weights[0], weights[-1]
    assert down is not None and last is not None
    width, hidden = down.shape
    tokens = x.numel() // hidden
    shape = (
        *(tokens, hidden, width, len(last), TYPES[x.dtype]),
        *(torch.get_num_threads(), max(1, min(tokens, _PARTS)), eps),
    )
    bias, scale, *rest = (w if w is None else w.float().contiguous() for w in weights[1:])
    return shape, (x, down.contiguous(), bias, previous, scale, *rest)


def _check(
    x: Tensor, previous: Tensor | None, weights: RouterWeights, context: RouterContext
) -> None:
    """ValueError or IndexError for what the library would trust."""
    present = {name: w for name, w in vars(weights).items() if w is not None}
    check("router", x, *present.values())
    width, classes = weights.down.shape[0], weights.out.shape[0]
    shapes = {"down": (width, x.shape[-1]), "out": (classes, width)}
    shapes |= {"fc1": (width, width), "fc2": (width, width)}
    for name, weight in present.items():
        check_shape(f"router: {name}", weight, shapes.get(name, (width,)))
    check_shape("router: balancing", context.balancing, (classes,))
    check_shape("router: valid", context.valid, x.shape[:-1])
    if previous is not None:
        check_shape("router: previous", previous, (*x.shape[:-1], width))
        check("router", previous, previous.new_empty(0, dtype=torch.float32))
    choice = context.choice
    if choice is None or isinstance(choice, FakeTensor):
        return
    check_shape("router: choice", choice, x.shape[:-1])
    # By NumPy: selective recomputation accepts no torch operation that the first pass had not.
    found = choice.numpy()
    if found.size and (found.min() < 0 or found.max() >= classes):
        ends = f"{found.min()} to {found.max()}"
        raise IndexError(f"router: a choice of {ends} is none of {classes} classes")


def router_native(
    x: Tensor, previous: Tensor | None, weights: RouterWeights, context: RouterContext
) -> Routed:
    """See `zaya_kernels.router.op.router`."""
    if weights.depth_scale is None:
        previous = None
    elif previous is None:
        weights = replace(weights, depth_scale=None)
    if context.load is None:
        context = replace(context, choice=None)
    _check(x, previous, weights, context)
    probability, state, choice = _Router.apply(x, previous, context, *vars(weights).values())
    load = context.load
    if context.choice is None or load is None:
        load = count_classes(choice, len(weights.out), context.valid).float()
    return Routed(choice, probability, state, load)
