"""The collectives this project uses, each a plain function of a group, and the arithmetic of
shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup


def sum_over(value: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """All-reduced sum, in place; the world when no group is given."""
    dist.all_reduce(value, group=group)
    return value


class _GatherDim0(torch.autograd.Function):
    """All-gather along dim 0; the backward sums every rank's gradient and keeps this rank's
    part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.rows = x.shape[0]
        full = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(full, x.contiguous(), group=group)
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_empty(ctx.rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [n, ...] on every rank -> [ranks * n, ...] in rank order; differentiable."""
    return _GatherDim0.apply(x, group)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sends: list[int], receives: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        out = x.new_empty(sum(receives), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty(sum(ctx.sends), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), ctx.sends, ctx.receives, group=ctx.group)
        return out, None, None, None


def exchange_rows(x: Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> Tensor:
    """x [sum of sends, ...] -> [sum of receives, ...]: sends[r] rows to rank r, receives[r] from
    it, both in rank order; differentiable, the backward sends gradients the same way back."""
    return _ExchangeRows.apply(x, sends, receives, group)


def all_to_all(
    x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: ProcessGroup
) -> Tensor:
    """Exchange pieces of a flat buffer: send_sizes[r] elements to rank r, receive_sizes[r] back."""
    out = x.new_empty(sum(receive_sizes))
    dist.all_to_all_single(out, x, list(receive_sizes), list(send_sizes), group=group)
    return out


def row_counts(rows: int, ranks: int) -> list[int]:
    """Rows of each rank under torch's chunked sharding: ceil(rows / ranks) until they run out."""
    size = -(-rows // ranks)
    return [max(0, min(size, rows - rank * size)) for rank in range(ranks)]
