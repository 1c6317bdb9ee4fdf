"""Attention in C by blocks, one segment and key head at a time (native/attention.c).

Every segment at its own length, also those behind earlier keys: nothing is gathered or padded.
Saved for backward: inputs, output, and the logarithm of each query's sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from zaya_kernels.native.library import TYPES, call, check, check_shape

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.attention.segments import AttentionPlan


def _shape(q: Tensor, k: Tensor) -> tuple[int | float, ...]:
    """`Shape` of attention.c."""
    heads, size = q.shape[2:]
    return heads, k.shape[2], size, TYPES[q.dtype], torch.get_num_threads(), size**-0.5


_MOST_HEADS = 192
"""BLOCK_ROWS of attention.c, which takes one token's at least."""


def _check_plan(q: Tensor, k: Tensor, plan: AttentionPlan) -> None:
    """ValueError unless heads divide and each segment is within queries and keys."""
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} heads of queries, {kv_heads} of keys")
    if heads > _MOST_HEADS * kv_heads:
        raise ValueError(
            f"attention: {heads} heads of queries to {kv_heads} of keys, native takes "
            f"{_MOST_HEADS} to one at most"
        )
    if isinstance(q, FakeTensor):
        return
    first, count = plan.segments[:, ::2], plan.segments[:, 1::2]
    # [n, 2]: of queries, of keys; a segment's queries are its last keys.
    rows = [q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]]
    outside = (first < 0) | (count < 0) | (first + count > torch.tensor(rows))
    whole = int(count[:, 0].sum()) == rows[0]
    if bool(outside.any()) or bool((count[:, 0] > count[:, 1]).any()) or not whole:
        raise ValueError(f"attention: the plan is none of {rows[0]} queries and {rows[1]} keys")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        call("zaya_attention", segments, len(segments), _shape(q, k), q, k, v, out, lse)
        ctx.save_for_backward(q, k, v, out, lse, segments)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse, segments = ctx.saved_tensors
        grad = grad.contiguous()
        shared = k.shape[1] != q.shape[1]
        to_q = torch.empty_like(q)
        # Keys of the row that no local query sees are in no segment.
        to_k, to_v = (
            torch.zeros_like(x, dtype=torch.float32) if shared else torch.empty_like(x)
            for x in (k, v)
        )
        tensors = (q, k, v, out, grad, lse, to_q, to_k, to_v)
        call(
            "zaya_attention_backward", segments, len(segments), _shape(q, k),
            (*tensors, int(shared)),
        )  # fmt: skip
        return to_q, to_k.to(k.dtype), to_v.to(v.dtype), None


def attention_native(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """See `zaya_kernels.attention.op.attention`."""
    check("attention", q, k, v)
    check_shape("attention: k", k, (q.shape[0], None, None, q.shape[3]))
    check_shape("attention: v", v, k.shape)
    _check_plan(q, k, plan)
    return _Attention.apply(q, k, v, plan.segments)
