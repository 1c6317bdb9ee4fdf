"""Permutation of tokens by expert in torch: a stable sort and index operations.

Where the host does not know how many tokens have an expert, all tokens are moved and those without
one masked, which is a pass more either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.counts import count_classes
from zaya_kernels.moe_permute.types import Load

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.moe_permute.types import Order


class _Gather(torch.autograd.Function):
    """Rows of x [T, D] by index [R]; the backward is a gather by the inverse, or a copy when rows
    are left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        full = grad.new_empty if index.numel() == ctx.size else grad.new_zeros
        return full(ctx.size, *grad.shape[1:]).index_copy_(0, index, grad), None


class _Scatter(torch.autograd.Function):
    """The reverse: rows [R, D] to their places in base [T, D], in place. The backward hands base's
    gradient back whole: what stands where rows land must not depend on anything."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, base: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.mark_dirty(base)
        return base.index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, grad


def count(choice: Tensor, num_experts: int) -> Load:
    """See `zaya_kernels.moe_permute.op.count_by_expert`."""
    return Load(choice, count_classes(choice, num_experts + 1), "eager")


def sort(load: Load) -> Tensor:
    """See `zaya_kernels.moe_permute.op.sort_by_expert`."""
    return torch.argsort(load.choice, stable=True)


def gather(tokens: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.moe_permute.op.gather`."""
    rows = _Gather.apply(tokens, order.order[: order.num_rows])
    return rows if order.known is not None else _only_routed(rows, order), tokens


def rest(base: Tensor, order: Order) -> Tensor:
    """See `zaya_kernels.moe_permute.op.rest_of`."""
    routed = _routed(order)
    skipped = torch.empty_like(routed).index_copy_(0, order.order, ~routed)
    return torch.where(skipped.unsqueeze(-1), base, 0)


def scatter(rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None) -> Tensor:
    """See `zaya_kernels.moe_permute.op.scatter`."""
    if order.known is None:
        out = _Gather.apply(_only_routed(rows, order), torch.argsort(order.order))
        out = out if rest is None else out + rest
    else:
        size = order.order.numel(), rows.shape[1]
        if rest is None:
            rest = rows.new_empty(size) if order.known == size[0] else rows.new_zeros(size)
        out = _Scatter.apply(rows, order.order[: order.known], rest)
    return out if probability is None else out * probability.unsqueeze(-1).to(out.dtype)


def _only_routed(rows: Tensor, order: Order) -> Tensor:
    """rows [T, D], zero from the first that has no expert on; so are their gradients."""
    return torch.where(_routed(order).unsqueeze(-1), rows, 0)


def _routed(order: Order) -> Tensor:
    """[T] bool: places with an expert."""
    tokens = order.order.numel()
    places = torch.arange(tokens, device=order.order.device)
    return places < tokens - order.counts[-1]
