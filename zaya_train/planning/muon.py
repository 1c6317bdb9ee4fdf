"""Muon's plan from the shapes of a model's parameters, without ranks, and what its rounds hold."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from zaya_train.optim.owners import Owner, matrices_of, plan
from zaya_train.optim.table import assign
from zaya_train.parallel.collectives import row_counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zaya_train.optim.owners import Matrix, Plan

_FP32 = 4


def muon_plan(
    shapes: Mapping[str, tuple[int, ...]], replicas: int, shards: int, expert: int = 1
) -> Plan:
    """Muon's plan where stacks are sharded between matrices, experts over `expert` ranks first."""
    table = assign(shapes)
    muon = [shape for name, shape in shapes.items() if table[name].optimizer == "muon"]
    places = matrices_of(muon, stacks_held(shapes, shards, expert))
    return plan([place.matrix for place in places], replicas, shards)


def stacks_held(shapes: Mapping[str, tuple[int, ...]], shards: int, expert: int) -> list[list[int]]:
    """[column][parameter of Muon's]: matrices of each stack on a column; 0 where the parameter is
    one matrix."""
    table = assign(shapes)
    counts = []
    for name, shape in shapes.items():
        view = table[name].view
        if view is not None:
            own = expert if table[name].what == "experts" else 1
            counts.append(matrices_held(shape[0], shards, own) if view.is_stack else [0] * shards)
    return [[count[column] for count in counts] for column in range(shards)]


def matrices_held(count: int, shards: int, expert: int) -> list[int]:
    """Of a stack of `count`, by column: divided over `expert` neighbours, then in chunks over the
    ranks that hold the same part (`parallel.mesh`)."""
    chunks = row_counts(count // expert, shards // expert)
    return [chunks[column // expert] for column in range(shards)]


def round_bytes(
    shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int, int], itemsize: int
) -> int:
    """Most that a round takes on rank 0, beside gradients and state.

    grid: replicas, shards, expert ranks; itemsize: of a Newton-Schulz element. Orthogonalising a
    batch takes its direction in fp32, iterates and their successors; the spread to replicas takes
    as many copies as there are and what all of them send.
    """
    replicas, shards, expert = grid
    made = muon_plan(shapes, replicas, shards, expert)
    most, first = 0, Owner(0, 0)
    for members in made.rounds:
        own = [made.matrices[i] for i in members if made.owners[i] == first]
        here = sum(made.elements_on(i, 0) for i in members if made.owners[i].replica == 0)
        everyone = sum(made.elements_on(i, 0) for i in members)
        results = _FP32 * sum(matrix.elements for matrix in own)
        spread = (replicas * here + everyone) * itemsize if replicas > 1 else 0
        most = max(most, results + _iterates(own) * itemsize, results + spread)
    return most


def _iterates(matrices: Sequence[Matrix]) -> int:
    """Elements of Newton-Schulz on the largest batch of equal shapes: three of its iterates and two
    Gram matrices of each."""
    elements: Counter[tuple[int, int]] = Counter()
    for matrix in matrices:
        small = min(matrix.rows, matrix.columns)
        elements[matrix.rows, matrix.columns] += 3 * matrix.elements + 2 * small * small
    return max(elements.values(), default=0)
