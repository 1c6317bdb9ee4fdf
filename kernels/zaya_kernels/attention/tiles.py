"""The work of a packed attention as tiles of one size, tables that its kernels read on the device.

A segment's queries, and a document's keys, are cut into tiles from their own start, so a tile never
holds two documents and no program has work beyond the diagonal only. Keys of one document may be
seen from several segments (the chunks of a context-parallel rank): their tile names them all, and
one program sums up the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

TILE = 128
"""Tokens of a tile; the kernels' blocks divide it."""


@dataclass(frozen=True)
class Tiles:
    """Tables on the device, int32; longest segments first, and of each the most work first."""

    queries: Tensor
    """[tiles, 5]: first query token, queries from there to the segment's end, first key token of
    the document, position of the first query in it, place of the tile's row statistics."""
    keys: Tensor
    """[tiles, 5]: first key token, keys from there to the last one that is seen, its position in
    the document, first row and number of rows of the document's segments."""
    segments: Tensor
    """[n, 4]: query start, query count, position of the first query, place of its row statistics,
    which have room for whole tiles; a document's are adjacent and in the order of positions."""
    covered_keys: int
    """Keys that some query sees; the others' gradient is zero."""


def plan_tiles(segments: Tensor, device: torch.device) -> Tiles:
    """Tiles of the segments [n, 4] (fields of `Segment`, on the CPU)."""
    starts, counts, key_starts, key_counts = segments.unbind(1)
    lead = key_counts - counts
    longest = torch.argsort(key_counts, descending=True, stable=True)
    which, first = _cut(counts[longest])
    which, first = longest[which], _backwards(first, which)
    rows = (counts + TILE - 1) // TILE * TILE
    places = rows.cumsum(0) - rows
    queries = torch.stack(
        [starts[which] + first, counts[which] - first, key_starts[which], lead[which] + first,
         places[which] + first], 1,
    )  # fmt: skip
    order = torch.argsort(key_counts, stable=True)
    order = order[torch.argsort(key_starts[order], stable=True)]
    documents, sizes = torch.unique_consecutive(key_starts[order], return_counts=True)
    last = sizes.cumsum(0) - 1
    # The last segment of a document sees the most of its keys.
    lengths = key_counts[order[last]]
    longest = torch.argsort(lengths, descending=True, stable=True)
    which, first = _cut(lengths[longest])
    which = longest[which]
    keys = torch.stack(
        [documents[which] + first, lengths[which] - first, first, last[which] - sizes[which] + 1,
         sizes[which]], 1,
    )  # fmt: skip
    seen = torch.stack([starts, counts, lead, places], 1)[order]
    queries, keys, seen = (table.to(torch.int32).to(device) for table in (queries, keys, seen))
    return Tiles(queries, keys, seen, covered_keys=int(lengths.sum()))


def _cut(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Row and first token of every tile of runs of the given lengths."""
    tiles = (lengths + TILE - 1) // TILE
    which = torch.repeat_interleave(tiles)
    base = tiles.cumsum(0) - tiles
    return which, (torch.arange(len(which)) - base[which]) * TILE


def _backwards(first: Tensor, which: Tensor) -> Tensor:
    """The tiles of each run from its end."""
    _, sizes = torch.unique_consecutive(which, return_counts=True)
    largest = first[sizes.cumsum(0) - 1]
    return torch.repeat_interleave(largest, sizes) - first
