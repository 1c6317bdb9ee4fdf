"""Packed attention on padded groups of documents, each group through `blocks` where the CPU gains
by it, else through torch's flash attention.

Documents of similar length form one batch padded on the right: causality alone keeps real queries
from padded keys, so no mask is needed and the flash path runs. Segments whose queries start inside
a document (context parallelism) go through `behind`, which needs none either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from zaya_kernels.attention.behind import behind
from zaya_kernels.attention.blocks import causal, worthwhile
from zaya_kernels.attention.flash import check_flash, flash_causal

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from zaya_kernels.attention.segments import AttentionPlan

    Core = Callable[[Tensor, Tensor, Tensor], Tensor]


class _TakeOnce(torch.autograd.Function):
    """Rows of x [R, ...] by index [M], where `inverse` [R] says which entry of the index is the one
    whose gradient counts for each row: the backward is a gather too, without atomics or sorting."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Return(torch.autograd.Function):
    """Rows of x [M, ...] by `inverse` [R]; unread rows (padding) get zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        full = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return full.index_copy_(0, inverse, grad), None


class _Parts(torch.autograd.Function):
    """Rows of x [T, ...] by `index`, each at most once, and the given [start, end) ranges of x;
    their gradients are added up in one buffer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, ranges: list[tuple[int, int]]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.ranges, ctx.shape = ranges, x.shape
        return x.index_select(0, index), *(x[start:end] for start, end in ranges)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *more: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        full = grad.new_zeros(ctx.shape).index_copy_(0, index, grad)
        for (start, end), part in zip(ctx.ranges, more, strict=True):
            full[start:end] += part
        return full, None, None


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [N, L, H, d], k and v [N, L, K, d] -> [N, L, H, d]."""
    on_cpu = q.device.type == "cpu"
    return causal(q, k, v) if on_cpu and worthwhile(q, k) else _sdpa(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Shapes as in `_causal`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        out = flash_causal(q, k, v)
    return out.transpose(1, 2)


def attention_eager(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """See `zaya_kernels.attention.op.attention`."""
    check_flash(q, "eager")
    return _grouped((q, k, v), plan, _causal)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """See `zaya_kernels.attention.op.attention`; torch's own attention for every group."""
    check_flash(q, "sdpa")
    return _grouped((q, k, v), plan, _sdpa)


def _grouped(
    inputs: tuple[Tensor, Tensor, Tensor], plan: AttentionPlan, causal_core: Core
) -> Tensor:
    """`causal_core` over the plan's padded groups of documents."""
    q, k, v = inputs
    if plan.whole_rows:
        return causal_core(q, k, v)
    groups, behinds = plan.groups.tolist(), plan.behind.tolist()
    sizes = [count * length for count, length in groups] + [row[1] for row in behinds]
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    earlier: list[tuple[Tensor, Tensor]] = []
    if k.shape[1] != q.shape[1]:
        ranges = [(start, start + keys - queries) for _, queries, start, keys in behinds]
        keys, *earlier_keys = _Parts.apply(keys, plan.own_keys, ranges)
        values, *earlier_values = _Parts.apply(values, plan.own_keys, ranges)
        earlier = list(zip(earlier_keys, earlier_values, strict=True))
    pieces = [
        _TakeOnce.apply(x, plan.taken, plan.inverse).split(sizes)
        for x in (q.flatten(0, 1), keys, values)
    ]
    parts = list(zip(*pieces, strict=True))
    outputs = [
        causal_core(*(x.unflatten(0, shape) for x in taken)).flatten(0, 1)
        for shape, taken in zip(groups, parts[: len(groups)], strict=True)
    ]
    outputs += [
        behind(query, (key, value), before)
        for (query, key, value), before in zip(parts[len(groups) :], earlier, strict=True)
    ]
    return _Return.apply(torch.cat(outputs), plan.inverse).view_as(q)
