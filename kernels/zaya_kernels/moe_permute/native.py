"""Permutation by expert with the moves in C (native/permute.c), and torch's stable sort.

The multiplication by the probability and its gradient are part of the moves. As in Triton, tokens
without an expert are read and written where they stand, and their gradient reaches `gather`'s
backward through its second output, of which no other row is written or read.

Saved for backward: the experts' rows, the probability, and `rest`, all as they came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from zaya_kernels.moe_permute import eager
from zaya_kernels.moe_permute.types import Load
from zaya_kernels.native.library import TYPES, call, check, check_shape

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.moe_permute.types import Order

sort = eager.sort


def count(choice: Tensor, num_experts: int) -> Load:
    """See `zaya_kernels.moe_permute.op.count_by_expert`."""
    return Load(choice, eager.count(choice, num_experts).counts, "native")


def _shape(order: Order, x: Tensor) -> tuple[int, ...]:
    """`Shape` of permute.c."""
    routed = order.known
    if routed is None:
        counted = not isinstance(order.counts, FakeTensor)
        routed = order.num_rows - (int(order.counts[-1]) if counted else 0)
    return order.order.numel(), routed, x.shape[1], TYPES[x.dtype], torch.get_num_threads()


def _to_rows(tokens: Tensor, order: Order) -> Tensor:
    rows = tokens.new_empty(order.num_rows, tokens.shape[1])
    call("zaya_gather", _shape(order, tokens), order.order, tokens, rows)
    return rows


def _to_tokens(
    rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None
) -> Tensor:
    out = rows.new_empty(order.order.numel(), rows.shape[1])
    exact = 0 if probability is None else TYPES[probability.dtype]
    call("zaya_scatter", _shape(order, rows), order.order, rows, rest, probability, exact, out)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Order) -> tuple[Tensor, Tensor]:
        ctx.order = order
        ctx.set_materialize_grads(False)
        return _to_rows(tokens, order), tokens

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_rest: Tensor | None
    ) -> tuple[Tensor | None, None]:
        if grad is None:
            return grad_rest, None
        rest = None if grad_rest is None else grad_rest.contiguous()
        return _to_tokens(grad.contiguous(), ctx.order, rest, None), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None
    ) -> Tensor:
        ctx.has_rest = rest is not None
        # Of plain copies nothing is needed to turn them back.
        kept = (None, None, None) if probability is None else (rows, rest, probability)
        ctx.save_for_backward(*kept)
        ctx.order = order
        return _to_tokens(rows, order, rest, probability)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, rest, probability = ctx.saved_tensors
        order: Order = ctx.order
        grad = grad.contiguous()
        if probability is None:
            return _to_rows(grad, order), None, grad if ctx.has_rest else None, None
        to_rest = torch.empty_like(rest) if ctx.needs_input_grad[2] else None
        made = torch.empty_like(rows), to_rest, torch.empty_like(probability)
        tensors, exact = (grad, rows, rest, probability, *made), TYPES[probability.dtype]
        call("zaya_scatter_backward", _shape(order, rows), order.order, tensors, exact)
        return made[0], None, to_rest, made[2]


def gather(tokens: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.moe_permute.op.gather`."""
    check("moe_permute", tokens)
    check_shape("moe_permute: tokens", tokens, (order.order.numel(), None))
    out: tuple[Tensor, Tensor] = _Gather.apply(tokens.contiguous(), order)
    return out


def rest(base: Tensor, order: Order) -> Tensor:
    """See `zaya_kernels.moe_permute.op.rest_of`."""
    return base


def scatter(rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None) -> Tensor:
    """See `zaya_kernels.moe_permute.op.scatter`."""
    check("moe_permute", rows, *(() if rest is None else (rest,)))
    tokens = order.order.numel()
    check_shape("moe_permute: rows", rows, (order.num_rows, None))
    if rest is not None:
        check_shape("moe_permute: rest", rest, (tokens, rows.shape[1]))
        rest = rest.contiguous()
    if probability is not None:
        check("moe_permute", probability)
        check_shape("moe_permute: probability", probability, (tokens,))
        probability = probability.contiguous()
    out: Tensor = _Scatter.apply(rows.contiguous(), order, rest, probability)
    return out
