"""Matrices to their owners and updates back, round by round, as `owners.plan` says.

In a round, within the owner's replica: one all-to-all brings the rows of every matrix that does not
lie whole on its owner, and one brings the rows of its update back. Then one all-to-all over the
replicas gives every rank of a column the updates that the column's other ranks have. A collective
without a byte to move is left out; all its ranks know that from the plan.

Directions travel in fp32, so that results do not depend on where they are computed; updates in the
dtype Newton-Schulz ran in, which holds them exactly. `owners.traffic` counts the elements. Sizes
and places are planned once; the flat buffers live for a round, because held ones (4 GB for the
8.8B model on 128 x 8 ranks) would lie beside activations, which are freed when this runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from zaya_train.optim.owners import Owner
from zaya_train.parallel.collectives import all_to_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from zaya_train.optim.owners import Plan


@dataclass(frozen=True)
class Groups:
    """The two kinds of company a shard of the parameters has; together they form a grid."""

    fsdp: ProcessGroup
    """Ranks that together hold one copy of the parameters."""
    replicate: ProcessGroup
    """Ranks that hold the same rows in every copy; one rank without replicas."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, end) of a matrix of the plan."""

    matrix: int
    start: int
    end: int
    columns: int

    @property
    def elements(self) -> int:
        return (self.end - self.start) * self.columns


@dataclass(frozen=True)
class Lane:
    """A flat buffer of pieces, in as many parts as the exchange has ranks."""

    parts: tuple[tuple[Piece, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Elements of each part."""
        return [sum(piece.elements for piece in part) for part in self.parts]

    def cut(self, flat: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece with its place in the buffer as a view [rows, columns]."""
        pieces = list(chain.from_iterable(self.parts))
        views = flat.split([piece.elements for piece in pieces])
        for piece, view in zip(pieces, views, strict=True):
            yield piece, view.view(-1, piece.columns)


@dataclass(frozen=True)
class Round:
    """One rank's part in a round."""

    owned: dict[tuple[int, int], tuple[int, ...]]
    """Shape -> matrices this rank orthogonalises."""
    kept: tuple[int, ...]
    """Those of them that lie whole on this rank."""
    moves: bool
    """Whether any matrix of this replica moves, on whatever rank."""
    sent: Lane
    """This rank's rows of moving matrices, by the owner's column."""
    received: Lane
    """Rows of moving matrices that this rank owns, by the holder's column."""
    copied: Lane
    """This rank's rows of all updates, by the owner's replica."""


class Exchange:
    """The collectives of one rank's rounds, on tensors of one device."""

    def __init__(
        self, plan: Plan, groups: Groups, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.groups = groups
        self.dtype, self.device = dtype, device
        self.replica, self.replicas = groups.replicate.rank(), plan.replicas
        rank = Owner(self.replica, groups.fsdp.rank())
        self.rounds = [_round(plan, members, rank) for members in plan.rounds]

    def to_owner(
        self, part: Round, whole: Mapping[int, Tensor], write: Callable[[Piece, Tensor], None]
    ) -> None:
        """Fill `whole`, a tensor [n, k] for each matrix this rank owns in the round.

        `write(piece, out)` stores local rows in `out`, fp32.
        """
        for i in part.kept:
            write(Piece(i, 0, *whole[i].shape), whole[i])
        if not part.moves:
            return
        send = torch.empty(sum(part.sent.sizes), device=self.device)
        for piece, view in part.sent.cut(send):
            write(piece, view)
        flat = all_to_all(send, part.sent.sizes, part.received.sizes, self.groups.fsdp)
        for piece, view in part.received.cut(flat):
            whole[piece.matrix][piece.start : piece.end] = view

    def to_ranks(self, part: Round, results: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Updates [n, k] of owned matrices -> local rows of every update of the round."""
        own = {i: results[i] for i in part.kept}
        if part.moves:
            send = torch.empty(sum(part.received.sizes), dtype=self.dtype, device=self.device)
            for piece, view in part.received.cut(send):
                view.copy_(results[piece.matrix][piece.start : piece.end])
            flat = all_to_all(send, part.received.sizes, part.sent.sizes, self.groups.fsdp)
            own |= {piece.matrix: view for piece, view in part.sent.cut(flat)}
        return own if self.replicas == 1 else self._spread(part, own)

    def _spread(self, part: Round, own: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Local rows of this replica's updates -> of all replicas'."""
        sizes = part.copied.sizes
        if not sum(sizes):
            return {}
        # An all-gather of uneven parts; gloo has none.
        send = torch.empty(self.replicas, sizes[self.replica], dtype=self.dtype, device=self.device)
        mine = Lane((part.copied.parts[self.replica],))
        for piece, view in mine.cut(send[0]):
            view.copy_(own[piece.matrix])
        send[1:] = send[0]
        repeated = [sizes[self.replica]] * self.replicas
        flat = all_to_all(send.view(-1), repeated, sizes, self.groups.replicate)
        return {piece.matrix: view for piece, view in part.copied.cut(flat)}


def _round(plan: Plan, members: Sequence[int], rank: Owner) -> Round:
    """What `rank` does with the matrices `members`."""
    columns = range(plan.shards)
    replica = [i for i in members if plan.owners[i].replica == rank.replica]
    moving = [i for i in replica if plan.moves(i)]
    owned = [i for i in replica if plan.owners[i] == rank]
    arriving = [i for i in owned if plan.moves(i)]
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i in owned:
        by_shape.setdefault((plan.matrices[i].rows, plan.matrices[i].columns), []).append(i)
    return Round(
        owned={shape: tuple(same) for shape, same in by_shape.items()},
        kept=tuple(i for i in owned if not plan.moves(i)),
        moves=bool(moving),
        sent=Lane(
            tuple(
                _pieces(plan, [i for i in moving if plan.owners[i].shard == column], rank.shard)
                for column in columns
            )
        ),
        received=Lane(tuple(_pieces(plan, arriving, column) for column in columns)),
        copied=Lane(
            tuple(
                _pieces(plan, [i for i in members if plan.owners[i].replica == r], rank.shard)
                for r in range(plan.replicas)
            )
        ),
    )


def _pieces(plan: Plan, members: Sequence[int], column: int) -> tuple[Piece, ...]:
    """Rows of `members` on a column, matrices without any left out."""
    pieces = []
    for i in members:
        matrix = plan.matrices[i]
        start, end = matrix.row_range(column, plan.shards)
        if end > start:
            pieces.append(Piece(i, start, end, matrix.columns))
    return tuple(pieces)
