"""Readable attention, one segment at a time, any precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_kernels.attention.segments import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.attention.segments import AttentionPlan


def attention_reference(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """See `zaya_kernels.attention.op.attention`."""
    heads, dim = q.shape[2:]
    group = heads // k.shape[2]
    flat_q, out = q.flatten(0, 1), torch.empty_like(q).flatten(0, 1)
    flat_k = k.flatten(0, 1).repeat_interleave(group, dim=1)
    flat_v = v.flatten(0, 1).repeat_interleave(group, dim=1)
    pieces = []
    segments = [Segment(*row) for row in plan.segments.tolist()]
    for s in segments:
        queries = flat_q[s.query_start : s.query_start + s.query_count]
        keys = flat_k[s.key_start : s.key_start + s.key_count]
        values = flat_v[s.key_start : s.key_start + s.key_count]
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * dim**-0.5
        offset = s.key_count - s.query_count
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(offset + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, values))
    order = torch.cat(
        [torch.arange(s.query_start, s.query_start + s.query_count) for s in segments]
    ).to(q.device)
    return out.index_copy(0, order, torch.cat(pieces)).view_as(q)
