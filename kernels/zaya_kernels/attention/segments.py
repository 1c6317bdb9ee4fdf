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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_QUERY_BLOCK = 1024
"""Longest run of queries that gets an explicit mask: 1,024 x 131,072 booleans are 128 MiB."""


@dataclass(frozen=True)
class Segment:
    """Queries [query_start, query_start + query_count), keys [key_start, key_start + key_count)."""

    query_start: int
    query_count: int
    key_start: int
    key_count: int


@dataclass(frozen=True)
class SegmentGroup:
    """Segments padded to a common shape: N segments, Q queries and L keys each."""

    queries: Tensor
    """[N, Q] int64 flattened query tokens; padding repeats the segment's first query."""
    keys: Tensor
    """[N, L] int64 flattened key tokens; padding repeats the segment's first key."""
    mask: Tensor | None
    """[N, 1, Q, L] bool, True where a query sees a key; None: plain top-left causal (Q == L)."""


@dataclass(frozen=True)
class AttentionPlan:
    """How to compute packed attention; built once per batch, used by every layer."""

    segments: Tensor
    """[segments, 4] int64 on the CPU: the fields of Segment. A tensor and not a tuple of
    dataclasses, because FSDP walks through every container among a module's arguments, every
    forward pass."""
    groups: tuple[SegmentGroup, ...]
    inverse: Tensor
    """[B * S] int64: where each query's output lies in the groups' concatenated outputs."""
    whole_rows: bool
    """Every row is one document and keys are local: no gathering needed."""


def _bucket(length: int) -> int:
    """Padded length: multiples of an eighth of the next power of two waste at most 12.5 percent."""
    step = max(8, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def _split(segment: Segment) -> list[Segment]:
    """Blocks of at most _QUERY_BLOCK queries for a segment that needs an explicit mask."""
    if segment.query_count == segment.key_count or segment.query_count <= _QUERY_BLOCK:
        return [segment]
    prefix = segment.key_count - segment.query_count
    blocks = []
    for start in range(0, segment.query_count, _QUERY_BLOCK):
        count = min(_QUERY_BLOCK, segment.query_count - start)
        blocks.append(
            Segment(segment.query_start + start, count, segment.key_start, prefix + start + count)
        )
    return blocks


def _indices(starts: Tensor, counts: Tensor, width: int) -> Tensor:
    """[N], [N] -> [N, width]: consecutive tokens, padding repeats the first."""
    steps = torch.arange(width)
    return starts[:, None] + torch.where(steps < counts[:, None], steps, 0)


def _table(segments: Sequence[Segment]) -> Tensor:
    """[N, 4] int64."""
    rows = [(s.query_start, s.query_count, s.key_start, s.key_count) for s in segments]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def _group(segments: Sequence[Segment], queries: int, keys: int) -> SegmentGroup:
    query_start, query_count, key_start, key_count = _table(segments).unbind(1)
    causal = all(s.query_count == s.key_count for s in segments) and queries == keys
    mask = None
    if not causal:
        last_key = (key_count - query_count)[:, None] + torch.arange(queries)
        seen = torch.arange(keys) <= last_key[:, :, None]
        mask = (seen & (torch.arange(keys) < key_count[:, None, None])).unsqueeze(1)
    return SegmentGroup(
        queries=_indices(query_start, query_count, queries),
        keys=_indices(key_start, key_count, keys),
        mask=mask,
    )


def plan_attention(
    segments: Sequence[Segment], num_queries: int, device: torch.device, whole_rows: bool
) -> AttentionPlan:
    """Group segments of similar shape and number their outputs.

    `num_queries` is B * S; the segments must cover every query exactly once (ValueError otherwise).
    """
    buckets: dict[tuple[int, int], list[Segment]] = defaultdict(list)
    for segment in segments:
        for block in _split(segment):
            offset = block.key_count - block.query_count
            queries = _bucket(block.query_count)
            keys = queries if offset == 0 else _bucket(block.key_count)
            buckets[(queries, keys if offset else -1)].append(block)
    inverse = torch.full((num_queries,), -1, dtype=torch.int64)
    groups, base = [], 0
    for (queries, keys), members in sorted(buckets.items()):
        groups.append(_group(members, queries, queries if keys < 0 else keys))
        for row, member in enumerate(members):
            place = base + row * queries
            where = slice(member.query_start, member.query_start + member.query_count)
            inverse[where] = torch.arange(place, place + member.query_count)
        base += len(members) * queries
    covered = sum(s.query_count for s in segments)
    if covered != num_queries or bool((inverse < 0).any()):
        raise ValueError(
            f"attention segments cover {covered} queries of {num_queries}; each must be met once"
        )
    return AttentionPlan(
        segments=_table(segments),
        groups=tuple(_to(group, device) for group in groups),
        inverse=inverse.to(device),
        whole_rows=whole_rows,
    )


def _to(group: SegmentGroup, device: torch.device) -> SegmentGroup:
    mask = None if group.mask is None else group.mask.to(device)
    return SegmentGroup(group.queries.to(device), group.keys.to(device), mask)
