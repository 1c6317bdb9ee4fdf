"""Muon on sharded matrices (arXiv 2502.16982; Jordan et al., kellerjordan.github.io/posts/muon).

    m <- mu m + g;   u = g + mu m (Nesterov) or m
    p <- p (1 - lr wd) - lr 0.2 sqrt(max(n, k)) NewtonSchulz(u)      for a matrix [n, k]

Newton-Schulz needs whole matrices and is the whole cost. Each matrix is orthogonalised once, by the
one rank of the grid replicas x shards that `owners` chose: stacks of matrices (experts, grouped
convolutions) are sharded between matrices, so a rank works on some of those it holds; plain
matrices are sharded by rows and exchanged. Replicas receive updates instead of repeating the work,
so they stay bitwise equal whatever their hardware. Momentum is elementwise and stays where the
parameter is, on every replica.

A step goes round by round, at most `owners.ROUND_ELEMENTS` of an owner at once; equal shapes of a
round are one batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from zaya_kernels.dtypes import DTYPES
from zaya_kernels.newton_schulz.op import newton_schulz

from zaya_train.config.newton_schulz import polynomials
from zaya_train.optim.exchange import Exchange
from zaya_train.optim.owners import matrices_of, plan
from zaya_train.parallel.collectives import all_gather

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from zaya_train.config.schema import MuonConfig
    from zaya_train.optim.exchange import Groups, Piece, Round
    from zaya_train.optim.shards import Shard
    from zaya_train.optim.table import MatrixView


class Muon:
    """Muon over the given shards: `views[i]` is what counts as one matrix of shard i, `decays[i]`
    says whether weight decay applies to it.

    Construction is collective and reads numbers other ranks send, so it is no work for fake or meta
    tensors (steps are, on fake ones). ValueError where a view does not fit its tensor or replicas
    do not hold the same matrices.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        views: Sequence[MatrixView],
        decays: Sequence[bool],
        config: MuonConfig,
        groups: Groups,
        backend: str,
    ) -> None:
        self.config = config
        self.polynomials = polynomials(config)
        self.backend = backend
        self.shards = list(shards)
        self.views = list(views)
        self._decaying = [shard for shard, on in zip(self.shards, decays, strict=True) if on]
        dtype = DTYPES[config.newton_schulz_dtype]
        self.momentum = [shard.state(DTYPES[config.momentum_dtype]) for shard in self.shards]
        counts = _local_counts(self.shards, self.views)
        _check_replicas([shard.name for shard in self.shards], counts, groups, self.device)
        held = _gathered(counts, groups.fsdp, self.device)
        places = matrices_of([shard.parameter.shape for shard in self.shards], held)
        matrices = [place.matrix for place in places]
        # Those with local rows, by number: shard, matrix within it.
        self._places = {
            i: (place.parameter, place.number)
            for i, place in enumerate(places)
            if place.matrix.home in (None, groups.fsdp.rank())
        }
        self.plan = plan(matrices, groups.replicate.size(), groups.fsdp.size())
        self._exchange = Exchange(self.plan, groups, dtype, self.device)
        self._scales = [
            config.update_rms * math.sqrt(max(matrix.rows, matrix.columns)) for matrix in matrices
        ]
        self._weights = self._split([shard.local for shard in self.shards])
        self._momenta = self._split(self.momentum)

    @property
    def device(self) -> torch.device:
        return self.shards[0].local.device if self.shards else torch.device("cpu")

    def step(self, learning_rate: float) -> None:
        """One update from the parameters' gradients. Collective."""
        gradients = [shard.grad.to(torch.float32) for shard in self.shards]
        mu = self.config.momentum
        for momentum, gradient in zip(self.momentum, gradients, strict=True):
            # One rounding, also in bf16.
            torch.add(gradient, momentum, alpha=mu, out=momentum)
        pieces = self._split(gradients)

        def direction(piece: Piece, out: Tensor) -> None:
            if self.config.nesterov:
                torch.add(pieces[piece.matrix], self._momenta[piece.matrix], alpha=mu, out=out)
            else:
                out.copy_(self._momenta[piece.matrix])

        for shard in self._decaying:
            shard.local.mul_(1 - learning_rate * self.config.weight_decay)
        for part in self._exchange.rounds:
            batches = {
                shape: torch.empty(len(members), *shape, device=self.device)
                for shape, members in part.owned.items()
            }
            self._exchange.to_owner(part, _by_matrix(part, batches), direction)
            updates = self._exchange.to_ranks(part, self._orthogonalise(part, batches))
            for i, update in updates.items():
                self._weights[i].add_(update, alpha=-learning_rate * self._scales[i])

    def _orthogonalise(
        self, part: Round, batches: dict[tuple[int, int], Tensor]
    ) -> dict[int, Tensor]:
        """Newton-Schulz of batches [N, n, k] by shape; the results by matrix."""
        dtype = DTYPES[self.config.newton_schulz_dtype]
        for shape, batch in batches.items():
            batches[shape] = newton_schulz(batch, self.polynomials, dtype, self.backend)
        return _by_matrix(part, batches)

    def _split(self, local: Sequence[Tensor]) -> dict[int, Tensor]:
        """Local parts of the shards -> this rank's rows of each matrix, as views."""
        parts = [view.split(x) for view, x in zip(self.views, local, strict=True)]
        return {i: parts[shard][k] for i, (shard, k) in self._places.items()}


def _by_matrix(part: Round, batches: dict[tuple[int, int], Tensor]) -> dict[int, Tensor]:
    return {
        i: matrix
        for shape, members in part.owned.items()
        for i, matrix in zip(members, batches[shape], strict=True)
    }


def _local_counts(shards: Sequence[Shard], views: Sequence[MatrixView]) -> list[int]:
    """Whole matrices of each stack on this rank."""
    for shard, view in zip(shards, views, strict=True):
        if shard.parameter.dim() != view.dims:
            raise ValueError(
                f"parameter {shard.name} of shape {list(shard.parameter.shape)} cannot be seen as "
                f"{view.words}, which takes {view.dims} dimensions"
            )
    return [
        shard.local.shape[0] if view.is_stack else 0
        for shard, view in zip(shards, views, strict=True)
    ]


def _gathered(counts: list[int], group: ProcessGroup, device: torch.device) -> list[list[int]]:
    """Every rank's `_local_counts`. How stacks are dealt is the parallel layout's affair: a rank
    may hold none, or rows that do not follow one another."""
    own = torch.tensor(counts, dtype=torch.int64, device=device)
    rows = all_gather(own, group).view(group.size(), len(counts))
    return [list(map(int, row)) for row in rows.tolist()]


def _check_replicas(
    names: Sequence[str], counts: list[int], groups: Groups, device: torch.device
) -> None:
    for replica, other in enumerate(_gathered(counts, groups.replicate, device)):
        for name, mine, theirs in zip(names, counts, other, strict=True):
            if mine != theirs:
                raise ValueError(
                    f"replica {groups.replicate.rank()} holds {mine} matrices of {name} on shard "
                    f"rank {groups.fsdp.rank()} and replica {replica} holds {theirs}"
                )
