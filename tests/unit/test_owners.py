"""Muon's plan: owners, rounds and traffic as pure functions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import muon_table
from zaya_train.optim import owners
from zaya_train.optim.owners import (
    SLACK,
    Matrix,
    Owner,
    Plan,
    least_load,
    matrices_of,
    plan,
    traffic,
)
from zaya_train.parallel.collectives import row_counts

DOCS = Path(__file__).parents[2] / "docs" / "muon.md"

sides = st.integers(1, 40)
degrees = st.integers(1, 6)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any matrices on any grid, some of them at home in a column."""
    replicas, shards = draw(degrees), draw(degrees)
    homes = st.none() | st.integers(0, shards - 1)
    matrices = draw(st.lists(st.builds(Matrix, sides, sides, homes), max_size=40))
    return plan(matrices, replicas, shards)


@given(plans())
def test_every_matrix_has_one_owner_in_the_grid_and_one_round(made: Plan) -> None:
    assert len(made.owners) == len(made.matrices)
    assert set(made.owners) <= set(product(range(made.replicas), range(made.shards)))
    assert sorted(i for members in made.rounds for i in members) == list(range(len(made.matrices)))
    assert sum(made.loads.values()) == sum(matrix.flops() for matrix in made.matrices)


@given(plans())
def test_the_slowest_rank_keeps_the_promised_bound(made: Plan) -> None:
    costs = [matrix.flops() for matrix in made.matrices]
    mean, largest = sum(costs) / len(made.loads), max(costs, default=0)
    bound = max(mean, largest)
    assert max(made.loads.values()) <= max(bound, mean + largest) + SLACK * bound + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(Matrix, sides, sides), min_size=1, max_size=7), st.integers(2, 3))
def test_matrices_without_a_home_keep_grahams_bound(matrices: list[Matrix], ranks: int) -> None:
    costs = [matrix.flops() for matrix in matrices]
    best = min(
        max(sum(c for c, r in zip(costs, chosen, strict=True) if r == k) for k in range(ranks))
        for chosen in product(range(ranks), repeat=len(costs))
    )
    slowest = max(plan(matrices, ranks, 1).loads.values())
    # Graham (1969): longest processing time first is within 4/3 - 1/(3 ranks) of the best.
    assert least_load(costs, ranks) <= best + 1e-6
    assert slowest <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-6


def test_the_largest_go_first_and_ties_to_the_lowest_column() -> None:
    sizes = [3, 9, 4, 8, 5]
    made = plan([Matrix(n, n) for n in sizes], 1, 3)
    # Cubes: 729 | 512 | 125 + 64 + 27.
    assert made.owners == tuple(Owner(0, column) for column in (2, 0, 2, 1, 2))


def test_an_expert_stays_in_its_column_while_that_costs_little() -> None:
    balanced = plan([Matrix(8, 8, home=s) for s in range(4) for _ in range(6)], 3, 4)
    assert not any(balanced.moves(i) for i in range(24))
    assert set(balanced.loads.values()) == {2 * Matrix(8, 8).flops()}
    crowded = plan([Matrix(8, 8, home=0) for _ in range(8)], 1, 4)
    assert set(crowded.loads.values()) == {2 * Matrix(8, 8).flops()}
    assert sum(crowded.moves(i) for i in range(8)) == 6


def test_one_column_never_exchanges() -> None:
    made = plan([Matrix(5, 7), Matrix(6, 6, home=0)] * 3, 4, 1)
    assert not any(made.moves(i) for i in range(6))
    assert all(traffic(made, rank)[:2] == (0, 0) for rank in made.loads)


@given(st.integers(1, 50), st.integers(1, 12))
def test_rows_are_dealt_as_torch_deals_them(rows: int, shards: int) -> None:
    ranges = [Matrix(rows, 3).row_range(shard, shards) for shard in range(shards)]
    assert [end - start for start, end in ranges] == row_counts(rows, shards)
    held = [range(*span) for span in ranges]
    assert [row for part in held for row in part] == list(range(rows))


@given(plans())
def test_traffic_is_the_arithmetic(made: Plan) -> None:
    sent = [traffic(made, rank) for rank in made.loads]
    assert sum(t.to_owners for t in sent) == sum(t.from_owners for t in sent)
    everything = sum(matrix.elements for matrix in made.matrices)
    assert sum(t.to_replicas for t in sent) == (made.replicas - 1) * everything


@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=20),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    degrees,
    degrees,
)
def test_an_even_matrix_sends_all_but_its_owners_share(
    sizes: list[tuple[int, int]], blocks: list[int], replicas: int, shards: int
) -> None:
    matrices = [Matrix(shards * blocks[i % len(blocks)], k) for i, (_, k) in enumerate(sizes)]
    made = plan(matrices, replicas, shards)
    total = sum(matrix.elements for matrix in matrices)
    sent = [traffic(made, rank) for rank in made.loads]
    assert sum(t.to_owners for t in sent) == total * (shards - 1) // shards


def test_rounds_hold_no_more_than_an_owners_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "ROUND_ELEMENTS", 100)
    made = plan([Matrix(5, 6), Matrix(20, 20), Matrix(7, 7)] * 9, 2, 2)
    for members in made.rounds:
        held: Counter[Owner] = Counter()
        for i in members:
            held[made.owners[i]] += made.matrices[i].elements
        alone = Counter(made.owners[i] for i in members)
        assert all(held[o] <= 100 or alone[o] == 1 for o in held)
    assert all(made.rounds)
    assert len(made.rounds) > 2


def test_matrices_are_listed_parameter_by_parameter_and_column_by_column() -> None:
    places = matrices_of([(4, 6), (3, 2, 5), (7, 8)], [[9, 2, 9], [9, 0, 9], [9, 1, 9]])
    assert [(p.parameter, p.number, p.matrix) for p in places] == [
        (0, 0, Matrix(4, 6)),
        (1, 0, Matrix(2, 5, home=0)),
        (1, 1, Matrix(2, 5, home=0)),
        (1, 0, Matrix(2, 5, home=2)),
        (2, 0, Matrix(7, 8)),
    ]


def test_operations_are_those_of_five_quintic_steps() -> None:
    # 2 x 2048^2 x 4096 twice and 2 x 2048^3 once, five times: 429.5 GFLOP.
    assert Matrix(4096, 2048).flops() == Matrix(2048, 4096).flops() == 429_496_729_600
    assert Matrix(3, 4).flops(steps=2) == 2 * (4 * 9 * 4 + 2 * 27)


@pytest.fixture(scope="module")
def rows_of_8b() -> list[muon_table.Row]:
    shapes = muon_table.shapes_of_8b()
    return [muon_table.row(shapes, *grid) for grid in muon_table.GRIDS]


def test_the_8b_plan_is_the_recorded_one(rows_of_8b: list[muon_table.Row]) -> None:
    assert [asdict(row) for row in rows_of_8b] == json.loads(muon_table.GOLDEN.read_text())
    assert muon_table.markdown(rows_of_8b) in DOCS.read_text()


def test_work_per_rank_falls_as_ranks_rise(rows_of_8b: list[muon_table.Row]) -> None:
    for row in rows_of_8b:
        assert row.matrices == 2040
        assert row.moved_experts == 0
        # Of what whole matrices allow; with 1,024 ranks that is two of an expert's second matrix.
        assert row.over_least <= 1.1
    assert [row.over_simple_bound <= 1.1 for row in rows_of_8b] == [True, True, False]
    assert rows_of_8b[2].slowest_rank_flops == 2 * Matrix(2048, 2048).flops()
