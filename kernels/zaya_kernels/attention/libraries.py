"""Attention by libraries that have a varlen flash kernel: flash-attn (by Composable Kernel on ROCm)
and AITER. Nothing is imported before a back end is called.

Both take packed queries and keys with the ends of every pair of runs, and align causality to the
bottom right: the last query of a pair sees its last key. A segment is such a pair, and segments
that lie side by side in queries and in keys are one call: all of a batch without context
parallelism, one chunk of a row with it. Keys are read where they lie, as ranges of the gathered
row, and gradients of ranges that overlap are added up in one buffer, in order.

Legend: B batch, S queries and T keys of a row, H query heads, K KV heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.attention.segments import AttentionPlan


class Varlen(Protocol):
    """What both libraries offer; `causal` and `deterministic` are among the rest."""

    def __call__(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **_: Any,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Call:
    """One call of the kernel: ranges [start, end) of queries and keys, and the pairs in them."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    query_counts: Tensor
    """[pairs] int64, on the CPU."""
    key_counts: Tensor


def calls_of(segments: Tensor) -> list[Call]:
    """Segments [n, 4] (fields of `Segment`, on the CPU; they cover all queries), cut where the keys
    do not go on."""
    segments = segments[segments[:, 0].argsort()]
    starts, counts, key_starts, key_counts = segments.unbind(1)
    ends, key_ends = starts + counts, key_starts + key_counts
    cuts = [0, *(1 + (key_starts[1:] != key_ends[:-1]).nonzero().flatten()).tolist(), len(segments)]
    return [
        Call(
            (int(starts[first]), int(ends[last - 1])),
            (int(key_starts[first]), int(key_ends[last - 1])),
            counts[first:last],
            key_counts[first:last],
        )
        for first, last in pairwise(cuts)
    ]


class _Ranges(torch.autograd.Function):
    """[start, end) ranges of x [T, ...] as views; their gradients are added up in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.shape = ranges, x.shape
        return tuple(x[start:end] for start, end in ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        full = grads[0].new_zeros(ctx.shape)
        for (start, end), grad in zip(ctx.ranges, grads, strict=True):
            full[start:end] += grad
        return full, None


def by_calls(run: Varlen, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """q [B, S, H, d], k and v [B, T, K, d] -> [B, S, H, d] by a library's kernel."""
    calls = calls_of(plan.segments)
    queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    ranges = [call.keys for call in calls]
    if ranges == [(0, keys.shape[0])]:
        parts = [(keys, values)]
    else:
        parts = list(zip(_Ranges.apply(keys, ranges), _Ranges.apply(values, ranges), strict=True))
    sizes = [end - start for start, end in (call.queries for call in calls)]
    outputs = [
        run(
            q=part,
            k=own_keys,
            v=own_values,
            cu_seqlens_q=_ends(call.query_counts, q.device),
            cu_seqlens_k=_ends(call.key_counts, q.device),
            max_seqlen_q=int(call.query_counts.max()),
            max_seqlen_k=int(call.key_counts.max()),
            causal=True,
            # Otherwise the queries' gradient is added up by atomics, in any order.
            deterministic=True,
        )
        for call, part, (own_keys, own_values) in zip(
            calls, queries.split(sizes), parts, strict=True
        )
    ]
    return torch.cat(outputs).view(q.shape)


def _ends(counts: Tensor, device: torch.device) -> Tensor:
    """[n] -> [n + 1] int32: where each run begins, and where the last one ends."""
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return ends.to(device, non_blocking=True)


def _check(name: str, q: Tensor) -> None:
    if q.dtype.itemsize != 2:
        raise ValueError(f"kernels.attention: {name} takes bf16 and fp16, not {q.dtype}")
    if q.device.type != "cuda":
        raise ValueError(f"kernels.attention: {name} needs a GPU, the tensors are on {q.device}")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise ValueError(
            f"kernels.attention: {name} takes head dims that are multiples of 8 up to 256, not "
            f"{q.shape[-1]}"
        )


def attention_flash_attn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """See `zaya_kernels.attention.op.attention`; flash-attn from 2.1 on, which aligns as above."""
    _check("flash_attn", q)
    from flash_attn import flash_attn_varlen_func

    return by_calls(flash_attn_varlen_func, q, k, v, plan)


def attention_aiter(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """See `zaya_kernels.attention.op.attention`."""
    _check("aiter", q)
    from aiter import flash_attn_varlen_func

    return by_calls(flash_attn_varlen_func, q, k, v, plan)
