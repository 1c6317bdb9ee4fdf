"""Packed attention on padded groups of documents, each group through `blocks` where the CPU gains
by it, else through torch's scaled_dot_product_attention.

Documents of similar length form one batch padded on the right: causality alone keeps real queries
from padded keys, so no mask is needed and the flash path runs. Only segments whose queries start
inside a document (context parallelism) carry a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from zaya_kernels.attention.blocks import causal, worthwhile

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.attention.segments import AttentionPlan


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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[N, Q, H, d], [N, L, K, d] -> [N, Q, H, d]; without a mask Q == L and attention is causal."""
    if mask is None and worthwhile(q, k):
        return causal(q, k, v)
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def attention_eager(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """See `zaya_kernels.attention.op.attention`."""
    if plan.whole_rows:
        return _sdpa(q, k, v, None)
    sizes = [group.queries.numel() for group in plan.groups]
    local = k.shape[1] == q.shape[1] and all(group.mask is None for group in plan.groups)
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    query_index = torch.cat([group.queries.flatten() for group in plan.groups])
    taken = _TakeOnce.apply(q.flatten(0, 1), query_index, plan.inverse)
    if local:
        keys = _TakeOnce.apply(flat_k, query_index, plan.inverse)
        values = _TakeOnce.apply(flat_v, query_index, plan.inverse)
        key_sizes = sizes
    else:
        key_index = torch.cat([group.keys.flatten() for group in plan.groups])
        keys, values = flat_k.index_select(0, key_index), flat_v.index_select(0, key_index)
        key_sizes = [group.keys.numel() for group in plan.groups]
    outputs = [
        _sdpa(
            query.unflatten(0, group.queries.shape),
            key.unflatten(0, group.keys.shape),
            value.unflatten(0, group.keys.shape),
            group.mask,
        ).flatten(0, 1)
        for group, query, key, value in zip(
            plan.groups,
            taken.split(sizes),
            keys.split(key_sizes),
            values.split(key_sizes),
            strict=True,
        )
    ]
    return _Return.apply(torch.cat(outputs), plan.inverse).view_as(q)
