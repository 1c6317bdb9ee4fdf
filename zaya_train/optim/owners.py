"""Who orthogonalises which matrix: a pure function of shapes and ranks.

Ranks form a grid: `replicas` rows that hold equal copies, `shards` columns that share one copy.
Every matrix has one owner in the whole grid, whatever its size; its update then travels to where it
is needed. Repeating the work on every replica instead would cost the 8.8B model 55 TFLOP per rank
and step with 8 shards, three quarters of a forward and backward of 16,384 tokens.

The rule is longest processing time first: matrices by falling cost, each to the least loaded rank.
A matrix that one column holds whole (an expert) stays in its column, where it needs no exchange,
unless a rank elsewhere would be better off by more than `SLACK`. The slowest rank's load is then at
most

    max(B, total / ranks + largest) + SLACK B,    B = max(total / ranks, largest)

since a rank is only given a matrix if it is the least loaded or ends below B, slack aside.

Legend: R replicas, S shards, matrix [n, k], m = min(n, k).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SLACK = 0.05
"""Share of the bound B that balance may lose to spare an expert its journey."""
ROUND_ELEMENTS = 2**26
"""Elements an owner works on at once: 256 MiB in fp32, eight of the 8.8B model's largest."""


class Owner(NamedTuple):
    """A rank of the grid."""

    replica: int
    shard: int


@dataclass(frozen=True)
class Matrix:
    """One matrix [rows, columns] and where its rows live in every replica."""

    rows: int
    columns: int
    home: int | None = None
    """The column that holds all of it; None: torch's chunked sharding by rows over all columns."""

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    def flops(self, steps: int = 5) -> int:
        """Of Newton-Schulz on the smaller side's Gram matrix: per step 2 m^2 n for X X^T, 2 m^3 for
        its square, 2 m^2 n for the product with X, with n the longer side."""
        small, large = sorted((self.rows, self.columns))
        return steps * (4 * small * small * large + 2 * small**3)

    def row_range(self, shard: int, shards: int) -> tuple[int, int]:
        """[start, end) of the rows that column `shard` holds."""
        if self.home is not None:
            return (0, self.rows) if shard == self.home else (0, 0)
        size = -(-self.rows // shards)
        return min(shard * size, self.rows), min((shard + 1) * size, self.rows)

    def elements_on(self, shard: int, shards: int) -> int:
        start, end = self.row_range(shard, shards)
        return (end - start) * self.columns


class Place(NamedTuple):
    """Where a matrix lies among a model's parameters."""

    matrix: Matrix
    parameter: int
    number: int
    """Among the parameter's local matrices on the matrix's home column; 0 without one."""


def matrices_of(shapes: Sequence[Sequence[int]], held: Sequence[Sequence[int]]) -> list[Place]:
    """All matrices of parameters [n, k] or stacks [N, n, k], in an order all ranks share.

    held[column][parameter]: matrices of a stack that a column holds; not read for plain ones.
    """
    places = []
    for parameter, shape in enumerate(shapes):
        rows, columns = shape[-2:]
        if len(shape) == 2:
            places.append(Place(Matrix(rows, columns), parameter, 0))
            continue
        for column, counts in enumerate(held):
            places += [
                Place(Matrix(rows, columns, home=column), parameter, k)
                for k in range(counts[parameter])
            ]
    return places


@dataclass(frozen=True)
class Plan:
    """Owners of all matrices, and the order of work."""

    matrices: tuple[Matrix, ...]
    replicas: int
    shards: int
    owners: tuple[Owner, ...]
    """Of each matrix."""
    rounds: tuple[tuple[int, ...], ...]
    """Matrices that are worked on together, by falling cost; every rank takes part in every round,
    also in one that holds no matrix of its own."""

    @property
    def loads(self) -> dict[Owner, int]:
        """Newton-Schulz operations of every rank in a step."""
        loads = {Owner(r, s): 0 for r in range(self.replicas) for s in range(self.shards)}
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            loads[owner] += matrix.flops()
        return loads

    def moves(self, i: int) -> bool:
        """Whether matrix i goes through the exchange of its owner's replica."""
        return self.shards > 1 and self.matrices[i].home != self.owners[i].shard

    def elements_on(self, i: int, shard: int) -> int:
        return self.matrices[i].elements_on(shard, self.shards)


def plan(matrices: Sequence[Matrix], replicas: int, shards: int) -> Plan:
    """Owners and rounds, the same on every rank that asks with the same arguments."""
    owners = _owners(matrices, replicas, shards)
    rounds = _rounds(matrices, owners)
    return Plan(tuple(matrices), replicas, shards, tuple(owners), rounds)


def least_load(costs: Iterable[int], ranks: int) -> float:
    """A lower bound on the slowest rank's load when matrices stay whole: the mean, the largest, and
    the two smallest of the `ranks + 1` largest, of which some rank must take two."""
    falling = sorted(costs, reverse=True)
    bounds = [sum(falling) / ranks, *falling[:1]]
    if len(falling) > ranks:
        bounds.append(falling[ranks - 1] + falling[ranks])
    return max(bounds)


class _Lightest:
    """Least loaded rank of each column and of all, lowest number first among equals."""

    def __init__(self, replicas: int, shards: int) -> None:
        self.load = {Owner(r, s): 0 for r in range(replicas) for s in range(shards)}
        # Columns vary fastest, so that matrices without a home spread over a replica first.
        self._all = [(0, owner) for owner in self.load]
        self._columns = [[(0, Owner(r, s)) for r in range(replicas)] for s in range(shards)]

    def of(self, column: int | None) -> Owner:
        """In one column, or anywhere."""
        heap = self._all if column is None else self._columns[column]
        while heap[0][0] != self.load[heap[0][1]]:
            heapq.heappop(heap)
        return heap[0][1]

    def add(self, owner: Owner, cost: int) -> None:
        self.load[owner] += cost
        for heap in (self._all, self._columns[owner.shard]):
            heapq.heappush(heap, (self.load[owner], owner))


def _owners(matrices: Sequence[Matrix], replicas: int, shards: int) -> list[Owner]:
    costs = [matrix.flops() for matrix in matrices]
    ranks = _Lightest(replicas, shards)
    bound = max(sum(costs) / (replicas * shards), max(costs, default=0))
    owners = [Owner(0, 0)] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: -costs[i]):
        owner = anywhere = ranks.of(None)
        home = matrices[i].home
        if home is not None:
            near = ranks.of(home)
            gain = ranks.load[near] - ranks.load[anywhere]
            if ranks.load[near] + costs[i] <= bound or gain <= SLACK * bound:
                owner = near
        owners[i] = owner
        ranks.add(owner, costs[i])
    return owners


def _rounds(matrices: Sequence[Matrix], owners: Sequence[Owner]) -> tuple[tuple[int, ...], ...]:
    """Every owner's matrices by falling cost, cut where `ROUND_ELEMENTS` are full; the k-th parts
    of all owners are the k-th round."""
    of_owner: dict[Owner, list[int]] = defaultdict(list)
    for i, owner in enumerate(owners):
        of_owner[owner].append(i)
    rounds: list[list[int]] = []
    for members in of_owner.values():
        members.sort(key=lambda i: (-matrices[i].flops(), matrices[i].rows, i))
        number, elements = 0, 0
        for i in members:
            elements += matrices[i].elements
            if elements > ROUND_ELEMENTS and elements > matrices[i].elements:
                number, elements = number + 1, matrices[i].elements
            while len(rounds) <= number:
                rounds.append([])
            rounds[number].append(i)
    return tuple(tuple(sorted(members)) for members in rounds)


class Traffic(NamedTuple):
    """Elements that one rank sends to other ranks in a step."""

    to_owners: int
    """Momentum directions in fp32, within the replica."""
    from_owners: int
    """Updates in the Newton-Schulz dtype, within the replica."""
    to_replicas: int
    """Updates in the Newton-Schulz dtype, to the other ranks of the column."""


def traffic(plan: Plan, rank: Owner) -> Traffic:
    """What `rank` sends. Where rows divide evenly, sums over the grid are, with P2 the elements of
    matrices that move and P all elements,

        to_owners = from_owners = (S - 1) / S P2        to_replicas = (R - 1) P

    so that without replicas a rank sends 2 (S - 1) / S of its shard of P2 on average, and with
    replicas one R-th of it: every matrix is exchanged within one replica only.
    """
    there = back = across = 0
    for i, (matrix, owner) in enumerate(zip(plan.matrices, plan.owners, strict=True)):
        if owner.replica != rank.replica:
            continue
        here = plan.elements_on(i, rank.shard)
        across += (plan.replicas - 1) * here
        if owner.shard == rank.shard:
            back += matrix.elements - here
        else:
            there += here
    return Traffic(there, back, across)
