"""Gather and scatter as autograd functions over a back end's passes.

The multiplication by the probability and its gradient are part of the scatter's passes. Tokens
without an expert are read and written where they stand; their gradient reaches `gather`'s backward
through its second output, of which no other row is written or read.

Saved for backward: the experts' rows, the probability, and `rest`, all as they came.

Legend: T tokens, D columns, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from zaya_kernels.moe_permute.types import Order

    Scattered = tuple[Tensor, Tensor | None, Tensor]
    """Rows [R, D], rest [T, D] and probability [T], or their gradients."""


@dataclass(frozen=True)
class Moves:
    """A back end's passes over contiguous tensors; none records gradients."""

    to_rows: Callable[[Tensor, Order], Tensor]
    """tokens [T, D] -> [R, D]."""
    to_tokens: Callable[[Tensor, Order, Tensor | None, Tensor | None], Tensor]
    """rows [R, D], rest and probability as `op.scatter`'s -> [T, D]."""
    scatter_backward: Callable[[Tensor, Order, Scattered, Scattered], None]
    """Fills the gradients of what was scattered, given that of the result [T, D]."""


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Order, moves: Moves) -> tuple[Tensor, Tensor]:
        ctx.order, ctx.moves = order, moves
        ctx.set_materialize_grads(False)
        return moves.to_rows(tokens, order), tokens

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_rest: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return grad_rest, None, None
        rest = None if grad_rest is None else grad_rest.contiguous()
        return ctx.moves.to_tokens(grad.contiguous(), ctx.order, rest, None), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        order: Order,
        rest: Tensor | None,
        probability: Tensor | None,
        moves: Moves,
    ) -> Tensor:
        ctx.order, ctx.moves, ctx.has_rest = order, moves, rest is not None
        # Of plain copies nothing is needed to turn them back.
        kept = (None, None, None) if probability is None else (rows, rest, probability)
        ctx.save_for_backward(*kept)
        return moves.to_tokens(rows, order, rest, probability)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, rest, probability = ctx.saved_tensors
        grad = grad.contiguous()
        if probability is None:
            grad_rows = ctx.moves.to_rows(grad, ctx.order)
            return grad_rows, None, grad if ctx.has_rest else None, None, None
        to_rest = torch.empty_like(rest) if ctx.needs_input_grad[2] else None
        made = torch.empty_like(rows), to_rest, torch.empty_like(probability)
        ctx.moves.scatter_backward(grad, ctx.order, (rows, rest, probability), made)
        return made[0], None, made[1], made[2], None


def gather(tokens: Tensor, order: Order, moves: Moves) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.moe_permute.op.gather`."""
    out: tuple[Tensor, Tensor] = _Gather.apply(tokens.contiguous(), order, moves)
    return out


def scatter(
    rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None, moves: Moves
) -> Tensor:
    """See `zaya_kernels.moe_permute.op.scatter`."""
    rest, probability = (x if x is None else x.contiguous() for x in (rest, probability))
    out: Tensor = _Scatter.apply(rows.contiguous(), order, rest, probability, moves)
    return out
