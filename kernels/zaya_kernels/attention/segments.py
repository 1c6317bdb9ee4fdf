"""Which queries meet which keys in a packed, possibly context-parallel batch.

A segment is one document's run of local queries with the keys they may see: the queries are the
last `query_count` positions of the key range, so causality is bottom-right aligned. Without
context parallelism a segment is a whole document and both ranges coincide.

Tokens are numbered over the flattened batch: local query token b * S + s, key token b * S_keys + s.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zaya_kernels.attention.tiles import plan_tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zaya_kernels.attention.tiles import Tiles


@dataclass(frozen=True)
class Segment:
    """Queries [query_start, query_start + query_count), keys [key_start, key_start + key_count)."""

    query_start: int
    query_count: int
    key_start: int
    key_count: int


@dataclass(frozen=True)
class AttentionPlan:
    """How to compute packed attention; built once per batch, used by every layer.

    Segments whose documents begin with them are padded to few lengths and computed in groups.
    Segments with earlier keys (context parallelism; at most one per chunk of a row) are computed
    one by one at their exact lengths. `taken` lists the queries of both in the order of
    computation.
    """

    segments: Tensor
    """[segments, 4] int64 on the CPU: the fields of Segment. A tensor and not a tuple of
    dataclasses, because FSDP walks through every container among a module's arguments, every
    forward pass."""
    groups: Tensor
    """[groups, 2] int64 on the CPU: segments and padded length of each group."""
    behind: Tensor
    """[n, 4] int64 on the CPU: as `segments`, those with earlier keys."""
    taken: Tensor
    """[M] int64: local token of every computed query, padding repeats a segment's first."""
    inverse: Tensor
    """[B * S] int64: where each query's output lies among the M computed ones."""
    own_keys: Tensor
    """[B * S] int64: each local token's place among the keys, when those are gathered."""
    whole_rows: bool
    """Every row is one document and keys are local: no gathering needed."""
    tiles: Tiles
    """The same work as the Triton kernels take it."""


def padded_length(length: int) -> int:
    """Padded length: multiples of an eighth of the next power of two waste at most 12.5 percent."""
    step = max(8, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def _indices(starts: Tensor, counts: Tensor, width: int) -> Tensor:
    """[N], [N] -> [N, width]: consecutive tokens, padding repeats the first."""
    steps = torch.arange(width)
    return starts[:, None] + torch.where(steps < counts[:, None], steps, 0)


def _table(segments: Sequence[Segment]) -> Tensor:
    """[N, 4] int64."""
    rows = [(s.query_start, s.query_count, s.key_start, s.key_count) for s in segments]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def plan_attention(
    segments: Sequence[Segment], num_queries: int, device: torch.device, whole_rows: bool
) -> AttentionPlan:
    """Group segments of similar length and number their outputs.

    `num_queries` is B * S; the segments must cover every query exactly once (ValueError otherwise).
    Segments without queries are left out.
    """
    segments = [s for s in segments if s.query_count]
    buckets: dict[int, list[Segment]] = defaultdict(list)
    behind = [s for s in segments if s.query_count < s.key_count]
    for segment in segments:
        if segment.query_count == segment.key_count:
            buckets[padded_length(segment.query_count)].append(segment)
    # Places are kept per local token: where its output will be, and where its own key is.
    inverse = torch.full((num_queries,), -1, dtype=torch.int64)
    own_keys = torch.empty(num_queries, dtype=torch.int64)
    taken, base = [], 0
    blocks = [(length, members) for length, members in sorted(buckets.items())]
    blocks += [(s.query_count, [s]) for s in behind]
    for length, members in blocks:
        table = _table(members)
        taken.append(_indices(table[:, 0], table[:, 1], length).flatten())
        for row, member in enumerate(members):
            where = slice(member.query_start, member.query_start + member.query_count)
            steps = torch.arange(member.query_count)
            inverse[where] = base + row * length + steps
            own_keys[where] = member.key_start + member.key_count - member.query_count + steps
        base += len(members) * length
    covered = sum(s.query_count for s in segments)
    if covered != num_queries or bool((inverse < 0).any()):
        raise ValueError(
            f"attention segments cover {covered} queries of {num_queries}; each must be met once"
        )
    sizes = [(len(members), length) for length, members in sorted(buckets.items())]
    table = _table(segments)
    return AttentionPlan(
        segments=table,
        groups=torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
        behind=_table(behind),
        taken=torch.cat(taken).to(device),
        inverse=inverse.to(device),
        own_keys=own_keys.to(device),
        whole_rows=whole_rows,
        tiles=plan_tiles(table, device),
    )


def key_query_pairs(plan: AttentionPlan) -> int:
    """Pairs of a query and a key it sees, over all segments: the work of attention."""
    _, queries, _, keys = plan.segments.unbind(1)
    return int((queries * (keys - queries) + queries * (queries + 1) // 2).sum())
