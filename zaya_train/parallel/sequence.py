"""Which part of a row each context-parallel rank holds.

A row of S tokens is cut into equal chunks. `head_tail`: 2 n chunks for n ranks, rank r holds
chunks r and 2n - 1 - r, so that every rank has the same amount of causal attention. `contiguous`:
n chunks, one each.

Legend: B batch, S row tokens, n ranks, c chunks per rank, L chunk tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zaya_train.parallel.collectives import all_gather

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Chunking:
    """How rows are divided among `ranks` context-parallel ranks."""

    ranks: int
    head_tail: bool

    @property
    def per_rank(self) -> int:
        """Chunks of a row on each rank."""
        return 2 if self.head_tail and self.ranks > 1 else 1

    def chunks_of(self, rank: int) -> list[int]:
        """Numbers of the row's chunks that `rank` holds, in local order."""
        if self.per_rank == 1:
            return [rank]
        return [rank, 2 * self.ranks - 1 - rank]

    def ranges_of(self, rank: int, row_tokens: int) -> list[tuple[int, int]]:
        """[start, end) of those chunks in a row of `row_tokens`."""
        length = row_tokens // (self.per_rank * self.ranks)
        return [(c * length, (c + 1) * length) for c in self.chunks_of(rank)]

    def order(self) -> list[int]:
        """Chunk number of each chunk in rank order: where gathered chunks belong in the row."""
        return [chunk for rank in range(self.ranks) for chunk in self.chunks_of(rank)]


def local_part(x: Tensor, chunking: Chunking, rank: int) -> Tensor:
    """x [B, S, ...] -> [B, S / n, ...], this rank's chunks."""
    ranges = chunking.ranges_of(rank, x.shape[1])
    return torch.cat([x[:, start:end] for start, end in ranges], dim=1)


class SharedRows:
    """ContextExchange of ranks that each hold chunks of the same rows.

    Everything moves by all-gather: one communicator, no send/receive order to get wrong. A layer
    moves its compressed keys and values once, and a halo of a few tokens per chunk.
    """

    def __init__(self, group: ProcessGroup, chunking: Chunking, device: torch.device) -> None:
        self.group = group
        self.chunking = chunking
        self._places = torch.argsort(torch.tensor(chunking.order())).to(device)
        """Place in rank order of each chunk of the row."""
        mine = torch.tensor(chunking.chunks_of(group.rank()))
        self._first = (mine == 0).view(1, -1, 1, 1).to(device)
        """Which of this rank's chunks begin the row: nothing precedes them."""
        before = torch.argsort(torch.tensor(chunking.order()))[(mine - 1).clamp_min(0)]
        self._before = before.to(device)
        """Place in rank order of the chunk before each of this rank's."""

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S / n, K, d] each -> [B, S, K, d], the row in order; one collective for both."""
        batch, local = keys.shape[:2]
        count = self.chunking.per_rank
        both = torch.cat([keys, values], dim=-1)
        chunks = both.view(batch, count, local // count, *both.shape[2:]).transpose(0, 1)
        row = all_gather(chunks, self.group).index_select(0, self._places)
        row = row.transpose(0, 1).flatten(1, 2)
        return row[..., : keys.shape[-1]], row[..., keys.shape[-1] :]

    def halo(self, x: Tensor, rows: int) -> Tensor:
        """[B, S / n, C] -> [B, c, rows, C]: the tokens before each local chunk, zeros before the
        row. A chunk shorter than `rows` cannot give its neighbour a halo: ValueError."""
        batch, local, channels = x.shape
        count = self.chunking.per_rank
        length = local // count
        if rows == 0:
            return x.new_zeros(batch, count, 0, channels)
        if length < rows:
            raise ValueError(
                f"context-parallel chunks of {length} tokens are shorter than the halo of {rows}"
            )
        tails = x.view(batch, count, length, channels)[:, :, length - rows :].transpose(0, 1)
        before = all_gather(tails, self.group).index_select(0, self._before).transpose(0, 1)
        return before.masked_fill(self._first, 0)
