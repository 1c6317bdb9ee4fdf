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
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.rows = x.shape[0]
        full = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_single(full, x.contiguous(), group=group)
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, grad.contiguous(), group=ctx.group)
        wide = torch.promote_types(grad.dtype, torch.float32)
        summed = parts.view(-1, ctx.rows, *grad.shape[1:]).sum(dim=0, dtype=wide)
        return summed.to(grad.dtype), None


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [n, ...] on every rank -> [ranks * n, ...] in rank order; differentiable.

    The backward gives every rank what all ranks' gradients of its rows add up to. They travel as
    they are, by an all-to-all, and are added in fp32 or higher and in rank order: a reduce-scatter
    of bf16 would round after every rank, and one of fp32 would send twice the bytes for the same
    sum.
    """
    return _GatherDim0.apply(x, group)


class Crossing:
    """One all-to-all of rows with uneven splits: `sends[r]` to rank r, `receives[r]` from it, both
    in rank order; the backward sends gradients the same way back.

    Launch and wait are calls, and autograd nodes, of their own. Work put between the two calls runs
    meanwhile; so does its backward, since autograd runs nodes in the reverse order of their making.
    """

    def __init__(self, sends: list[int], receives: list[int], group: ProcessGroup) -> None:
        self.sends, self.receives, self.group = sends, receives, group
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def launch(self, x: Tensor) -> Tensor:
        """x [sum of sends, ...] -> [sum of receives, ...], not to be read before `land`."""
        return _Launch.apply(x, self)

    def land(self, rows: Tensor) -> Tensor:
        """What `launch` returned, arrived. Once per launch."""
        return _Land.apply(rows, self)

    def begin(self, x: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        """Start an exchange and return its future output."""
        out = x.new_empty(sum(receives), *x.shape[1:])
        work = dist.all_to_all_single(
            out, x.contiguous(), receives, sends, group=self.group, async_op=True
        )
        self._under_way = work, out
        return out

    def wait(self) -> Tensor:
        """What `begin` returned, its rows arrived: for the host on a CPU, the stream on a GPU."""
        assert self._under_way is not None
        work, out = self._under_way
        self._under_way = None
        work.wait()
        return out


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.begin(x, crossing.sends, crossing.receives)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.crossing.wait(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        crossing: Crossing = ctx.crossing
        crossing.begin(grad, crossing.receives, crossing.sends)
        # Autograd wants the shape of `rows`; what travels is met in _Launch.
        return grad, None


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
