"""Every layout of ranks trains as one process does."""

from __future__ import annotations

import numpy as np
import pytest

from tests.dist.harness import (
    DOCUMENTS,
    ROW_TOKENS,
    Case,
    Outcome,
    norm_of_gathered,
    relative,
    run_cases,
)
from tests.helpers.distributed import run_ranks

TOLERANCE = 1e-5  # fp32, relative to each tensor's norm

ALONE = Case(micro_rows=4)
CASES = {
    1: [Case(micro_rows=1), Case(micro_rows=2)],
    2: [
        Case(shard=2, micro_rows=1),
        Case(shard=2, micro_rows=2),
        Case(replicate=2, micro_rows=1),
        Case(context=2, micro_rows=4),
        Case(context=2, micro_rows=1),
        Case(context=2, micro_rows=2, chunks="contiguous"),
    ],
    4: [
        Case(shard=4),
        Case(replicate=2, shard=2),
        Case(replicate=4),
        Case(shard=2, context=2, micro_rows=2),
        Case(shard=2, context=2, micro_rows=1, chunks="contiguous"),
        Case(replicate=2, context=2, micro_rows=1),
        Case(context=4, micro_rows=4),
        Case(context=4, micro_rows=1),
        Case(context=4, micro_rows=2, chunks="contiguous"),
    ],
}
ALL = [(world, case) for world, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return run_ranks(run_cases, 1, [ALONE])[0][ALONE.name]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    """Every rank's outcome of every case; one set of processes per number of ranks."""
    found: dict[str, list[Outcome]] = {}
    for world, cases in CASES.items():
        ranks = run_ranks(run_cases, world, cases, timeout=300)
        found |= {case.name: [rank[case.name] for rank in ranks] for case in cases}
    return found


def test_documents_meet_the_cuts_in_every_way() -> None:
    cuts = range(4, ROW_TOKENS, 4)
    spans = []
    for lengths in DOCUMENTS:
        ends = np.cumsum(lengths).tolist()
        spans += list(zip([0, *ends[:-1]], ends, strict=True))
    assert any(start < cut < end for start, end in spans for cut in cuts)
    assert any(end == cut for _, end in spans for cut in cuts)
    assert any(start == cut for start, _ in spans for cut in cuts)
    assert any(start == cut - 1 and end > cut for start, end in spans for cut in cuts)
    assert any(sum(lengths) % 4 and sum(lengths) < ROW_TOKENS for lengths in DOCUMENTS)


def test_the_reference_clips_and_learns(alone: Outcome) -> None:
    assert min(alone.norms) < 2.0 < max(alone.norms)
    for norm, gradients in zip(alone.norms, alone.gradients, strict=True):
        flat = np.concatenate([g.ravel() for g in gradients.values()])
        applied = np.linalg.norm(flat.astype(np.float64))
        assert applied == pytest.approx(min(norm, 2.0), rel=1e-6)
    bias = alone.final["model.layers.0.moe.router.balancing_bias"]
    assert np.all(bias[:-1] != 0)
    assert bias[-1] == -1


@pytest.mark.parametrize(("world", "case"), ALL, ids=[case.name for _, case in ALL])
class TestLayout:
    def test_losses_and_norms(
        self, world: int, case: Case, alone: Outcome, outcomes: dict[str, list[Outcome]]
    ) -> None:
        for rank in outcomes[case.name]:
            assert rank.losses == pytest.approx(alone.losses, rel=TOLERANCE)
            assert rank.norms == pytest.approx(alone.norms, rel=TOLERANCE)
            assert rank.supervised == alone.supervised
            assert rank.loads == alone.loads

    def test_gradients(
        self, world: int, case: Case, alone: Outcome, outcomes: dict[str, list[Outcome]]
    ) -> None:
        for got, expected in zip(outcomes[case.name][0].gradients, alone.gradients, strict=True):
            assert got.keys() == expected.keys()
            errors = {n: relative(got[n], expected[n]) for n in expected}
            assert {n: e for n, e in errors.items() if e > TOLERANCE} == {}

    def test_weights_biases_and_optimizer_state(
        self, world: int, case: Case, alone: Outcome, outcomes: dict[str, list[Outcome]]
    ) -> None:
        got = outcomes[case.name][0].final
        assert got.keys() == alone.final.keys()
        errors = {n: relative(got[n], alone.final[n]) for n in got}
        assert {n: e for n, e in errors.items() if e > TOLERANCE} == {}

    def test_validation_losses(
        self, world: int, case: Case, alone: Outcome, outcomes: dict[str, list[Outcome]]
    ) -> None:
        for rank in outcomes[case.name]:
            assert rank.validation == pytest.approx(alone.validation, rel=TOLERANCE)

    def test_ranks_agree_bitwise(
        self, world: int, case: Case, alone: Outcome, outcomes: dict[str, list[Outcome]]
    ) -> None:
        ranks = outcomes[case.name]
        assert len(ranks) == world
        for rank in ranks:
            assert rank.losses == ranks[0].losses
            assert rank.norms == ranks[0].norms
            assert rank.validation == ranks[0].validation
        replicas: dict[int, set[str]] = {}
        for rank in ranks:
            replicas.setdefault(rank.fsdp_rank, set()).add(rank.local_digest)
        assert len(replicas) == case.shard * case.context
        assert all(len(digests) == 1 for digests in replicas.values())


@pytest.mark.parametrize("case", [Case(replicate=2, context=2), Case(shard=4)])
def test_global_norm_is_the_norm_of_the_whole_gradient(case: Case) -> None:
    for ours, gathered in run_ranks(norm_of_gathered, case.world, case):
        assert ours == pytest.approx(gathered, rel=1e-6)
