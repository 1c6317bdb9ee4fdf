"""Muon on sharded matrices (arXiv 2502.16982; Jordan et al., kellerjordan.github.io/posts/muon).

    m <- mu m + g;   u = g + mu m (Nesterov) or m
    p <- p (1 - lr wd) - lr 0.2 sqrt(max(n, k)) NewtonSchulz(u)      for a matrix [n, k]

Newton-Schulz needs whole matrices. Stacks of matrices (experts, grouped convolutions) are sharded
between matrices, so every rank holds whole ones. Plain matrices are sharded by rows: one all-to-all
brings each to the rank that owns it, owners chosen so that work is even, and one brings the rows of
the result back. Everything of one shape is one batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from zaya_kernels.dtypes import DTYPES
from zaya_kernels.newton_schulz.op import newton_schulz

from zaya_train.parallel.collectives import all_to_all, row_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from zaya_train.config.schema import MuonConfig
    from zaya_train.optim.shards import Shard


class Muon:
    """Muon over the given shards; `group` is the ranks the parameters are sharded over."""

    def __init__(
        self, shards: Sequence[Shard], config: MuonConfig, group: ProcessGroup, backend: str
    ) -> None:
        self.config = config
        self.backend = backend
        self.group = group
        self.shards = list(shards)
        self.momentum = [shard.state() for shard in self.shards]
        self._matrices = [i for i, s in enumerate(self.shards) if s.parameter.dim() == 2]
        self._stacks = [i for i, s in enumerate(self.shards) if s.parameter.dim() == 3]
        shapes = [tuple(self.shards[i].parameter.shape) for i in self._matrices]
        self._exchange = _Exchange(shapes, group)

    def step(self, learning_rate: float) -> None:
        """One update from the parameters' gradients."""
        directions = self._directions()
        owned = self._exchange.to_owners([directions[i] for i in self._matrices])
        stacked = [matrix for i in self._stacks for matrix in directions[i]]
        results = self._orthogonalise([*owned, *stacked])
        updates = dict(
            zip(self._matrices, self._exchange.to_shards(results[: len(owned)]), strict=True)
        )
        rest = iter(results[len(owned) :])
        for i in self._stacks:
            if len(directions[i]):
                updates[i] = torch.stack([next(rest) for _ in directions[i]])
        self._apply(updates, learning_rate)

    def _directions(self) -> list[Tensor]:
        """Momentum updated, Nesterov looked ahead; local parts in fp32."""
        mu = self.config.momentum
        directions = []
        for shard, momentum in zip(self.shards, self.momentum, strict=True):
            grad = shard.grad.to(torch.float32)
            momentum.mul_(mu).add_(grad)
            nesterov = self.config.nesterov
            directions.append(torch.add(grad, momentum, alpha=mu) if nesterov else momentum)
        return directions

    def _orthogonalise(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Newton-Schulz of each, equal shapes in one batch; order kept."""
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for i, matrix in enumerate(matrices):
            by_shape[matrix.shape].append(i)
        results: list[Tensor] = list(matrices)
        dtype, steps = DTYPES[self.config.newton_schulz_dtype], self.config.newton_schulz_steps
        for members in by_shape.values():
            batch = torch.stack([matrices[i] for i in members])
            for i, result in zip(
                members, newton_schulz(batch, steps, dtype, self.backend), strict=True
            ):
                results[i] = result
        return results

    def _apply(self, updates: dict[int, Tensor], learning_rate: float) -> None:
        for i, update in updates.items():
            shard = self.shards[i]
            scale = self.config.update_rms * math.sqrt(max(shard.parameter.shape[-2:]))
            shard.local.mul_(1 - learning_rate * self.config.weight_decay)
            shard.local.add_(update, alpha=-learning_rate * scale)


class _Exchange:
    """Row shards of matrices to whole matrices on their owners, and back."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], group: ProcessGroup) -> None:
        self.group = group
        self.ranks, self.rank = group.size(), group.rank()
        self.device = torch.device("cpu")
        self.shapes = list(shapes)
        self.owners = _assign_owners(shapes, self.ranks)
        self.rows = [row_counts(shape[0], self.ranks) for shape in shapes]

    def to_owners(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Local rows of every matrix -> the whole matrices this rank owns, in order."""
        if self.ranks == 1 or not parts:
            return list(parts)
        self.device = parts[0].device
        by_owner = [self._of(r) for r in range(self.ranks)]
        send = torch.cat([parts[i].reshape(-1) for members in by_owner for i in members])
        sizes = [sum(parts[i].numel() for i in members) for members in by_owner]
        mine = self._of(self.rank)
        back = [sum(self._numel(i, r) for i in mine) for r in range(self.ranks)]
        received = all_to_all(send, sizes, back, self.group).split(back)
        pieces = [part.split([self._numel(i, r) for i in mine]) for r, part in enumerate(received)]
        return [
            torch.cat([pieces[r][k] for r in range(self.ranks)]).view(self.shapes[i])
            for k, i in enumerate(mine)
        ]

    def to_shards(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """Whole owned matrices -> local rows of every matrix."""
        if self.ranks == 1 or not self.shapes:
            return list(whole)
        mine = self._of(self.rank)
        split = [w.split(self.rows[i]) for w, i in zip(whole, mine, strict=True)]
        sizes = [sum(self._numel(i, r) for i in mine) for r in range(self.ranks)]
        pieces = [rows[r].reshape(-1) for r in range(self.ranks) for rows in split]
        send = torch.cat(pieces) if pieces else torch.empty(0, device=self.device)
        by_owner = [self._of(r) for r in range(self.ranks)]
        back = [sum(self._numel(i, self.rank) for i in members) for members in by_owner]
        received = all_to_all(send, sizes, back, self.group).split(back)
        results: dict[int, Tensor] = {}
        for members, part in zip(by_owner, received, strict=True):
            sized = part.split([self._numel(i, self.rank) for i in members])
            for i, piece in zip(members, sized, strict=True):
                results[i] = piece.view(self.rows[i][self.rank], self.shapes[i][1])
        return [results[i] for i in range(len(self.shapes))]

    def _of(self, rank: int) -> list[int]:
        return [i for i, owner in enumerate(self.owners) if owner == rank]

    def _numel(self, i: int, rank: int) -> int:
        return self.rows[i][rank] * self.shapes[i][1]


def _assign_owners(shapes: Sequence[tuple[int, ...]], ranks: int) -> list[int]:
    """Longest processing time first: the costliest matrix to the least loaded rank."""
    cost = [min(shape) ** 2 * max(shape) for shape in shapes]
    load = [0] * ranks
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -cost[i]):
        owners[i] = min(range(ranks), key=lambda r: load[r])
        load[owners[i]] += cost[i]
    return owners
