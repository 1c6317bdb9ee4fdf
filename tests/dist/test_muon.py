"""Distributed Muon against one process, replicas against each other, bytes against arithmetic."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import pytest

from tests.dist.harness import Case, Setup, relative
from tests.dist.muon_ranks import (
    EVEN,
    EXPERTS,
    UNEVEN,
    Grid,
    Outcome,
    replicas_that_differ,
    run_grids,
)
from tests.helpers.distributed import RankError, run_ranks
from zaya_train.planning.muon import muon_plan

if TYPE_CHECKING:
    from zaya_train.optim.owners import Plan

TOLERANCE = 1e-6  # fp32, relative to each tensor's norm

LAYOUTS = [
    Grid(shard=4),
    Grid(replicate=2, shard=2),
    Grid(replicate=4),
    Grid(replicate=2, shard=2, round_elements=300),
    Grid(shard=4, round_elements=1),
    Grid(shard=4, expert=2, shapes=EVEN),
    Grid(replicate=2, shard=2, expert=2, shapes=EVEN),
    Grid(shard=4, expert=2, shapes=EXPERTS),
    Grid(shard=4, shapes=EVEN),
    Grid(replicate=2, shard=2, shapes=EVEN),
    Grid(replicate=2, shard=2, shapes=EVEN, dtype="bf16"),
    Grid(replicate=2, shard=2, dtype="bf16", momentum_dtype="bf16"),
]
IDS = [grid.name for grid in LAYOUTS]


def one_process(grid: Grid) -> Grid:
    return replace(grid, replicate=1, shard=1, expert=1, round_elements=2**26)


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    return run_ranks(run_grids, 1, list({one_process(grid): None for grid in LAYOUTS}))[0]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    ranks = run_ranks(run_grids, 4, LAYOUTS)
    return {grid.name: [rank[grid.name] for rank in ranks] for grid in LAYOUTS}


@pytest.mark.parametrize("grid", LAYOUTS, ids=IDS)
class TestGrid:
    def test_weights_and_momenta_equal_one_process(
        self, grid: Grid, alone: dict[str, Outcome], outcomes: dict[str, list[Outcome]]
    ) -> None:
        expected = alone[one_process(grid).name]
        for rank in outcomes[grid.name]:
            for got, reference in zip(rank.weights, expected.weights, strict=True):
                assert relative(got, reference) <= TOLERANCE
            for got, reference in zip(rank.momenta, expected.momenta, strict=True):
                assert relative(got, reference) == 0

    def test_replicas_are_bitwise_equal(
        self, grid: Grid, alone: dict[str, Outcome], outcomes: dict[str, list[Outcome]]
    ) -> None:
        columns: dict[int, set[str]] = {}
        for rank in outcomes[grid.name]:
            columns.setdefault(rank.column, set()).add(rank.digest)
        assert len(columns) == grid.shard
        assert all(len(digests) == 1 for digests in columns.values())

    def test_bytes_sent_are_the_planned_ones_and_nothing_else(
        self, grid: Grid, alone: dict[str, Outcome], outcomes: dict[str, list[Outcome]]
    ) -> None:
        update_bytes = {"fp32": 4, "bf16": 2}[grid.dtype]
        for rank in outcomes[grid.name]:
            there, back, across = rank.planned
            expected = {"fsdp": 4 * there + update_bytes * back, "copies": update_bytes * across}
            assert rank.sent_bytes.keys() <= expected.keys()
            assert {**dict.fromkeys(expected, 0), **rank.sent_bytes} == expected


@pytest.mark.parametrize(
    "grid",
    [g for g in LAYOUTS if g.shapes == EVEN],
    ids=[g.name for g in LAYOUTS if g.shapes == EVEN],
)
def test_bytes_sent_by_all_are_the_formulas(grid: Grid, outcomes: dict[str, list[Outcome]]) -> None:
    update_bytes = {"fp32": 4, "bf16": 2}[grid.dtype]
    everything = sum(prod(shape) for shape in EVEN)
    plain = sum(prod(shape) for shape in EVEN if len(shape) == 2)
    sent = [rank.sent_bytes for rank in outcomes[grid.name]]
    within = (grid.shard - 1) * plain * (4 + update_bytes) // grid.shard
    assert sum(s.get("fsdp", 0) for s in sent) == within
    across = (grid.replicate - 1) * everything * update_bytes
    assert sum(s.get("copies", 0) for s in sent) == across


def test_the_uneven_shapes_leave_ranks_without_rows_and_matrices() -> None:
    assert any(len(shape) == 2 and shape[0] < 4 for shape in UNEVEN)
    assert any(len(shape) == 3 and shape[0] < 4 for shape in UNEVEN)


def test_replicas_with_different_matrices_are_refused() -> None:
    rule = r"replica 0 holds 3 matrices of p on shard rank 0 and replica 1 holds 4"
    with pytest.raises(RankError, match=rule):
        run_ranks(replicas_that_differ, 2)


def plans_of(case: Case) -> tuple[Plan, Plan]:
    """What a run's ranks agree on, and what `zaya plan` says beforehand."""
    setup = Setup.of(case)
    shapes = {name: tuple(p.shape) for name, p in setup.model.named_parameters()}
    said = muon_plan(shapes, case.replicate, case.shard * case.context, case.expert)
    return setup.optimizer.muon.plan, said


@pytest.mark.parametrize(
    "case",
    [
        Case(shard=4, experts=6),
        # Two, two, one and one; FSDP alone would deal two, two, two and none.
        Case(shard=4, expert=2, experts=6),
        Case(replicate=2, shard=2, expert=2, experts=6),
        # One expert for two ranks, one of which holds nothing of it.
        Case(shard=2, context=2, expert=2, experts=2),
    ],
    ids=lambda case: case.name,
)
def test_the_plan_that_is_printed_is_the_plan_that_runs(case: Case) -> None:
    for real, said in run_ranks(plans_of, case.world, case):
        assert said == real
