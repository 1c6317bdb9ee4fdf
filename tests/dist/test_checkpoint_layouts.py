"""A checkpoint of one layout, experts divided or not, loads bitwise into any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.dist.harness import Case, Part, Setup, together
from tests.faults.states import MODEL, record
from tests.helpers.distributed import run_ranks
from zaya_train.train.checkpoint import CheckpointStore

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Parts = dict[str, Part]


def parts_of(setup: Setup) -> Parts:
    return {name: Part.of(tensor) for name, tensor in setup.tensors().items()}


def train_and_save(case: Case, root: Path) -> Parts:
    setup = Setup.of(case)
    setup.step(0)
    CheckpointStore(root, keep_last=2).save(setup.tensors(), record(1))
    return parts_of(setup)


def load(case: Case, root: Path, seed: int) -> Parts:
    setup = Setup.of(case, **{"run.seed": seed})
    store = CheckpointStore(root, keep_last=2)
    found = store.newest()
    assert found is not None
    store.load(found, setup.tensors(), MODEL)
    return parts_of(setup)


def joined(ranks: list[Parts]) -> dict[str, NDArray[Any]]:
    return {name: together([rank[name] for rank in ranks]) for name in ranks[0]}


@pytest.mark.parametrize("experts", [4, 6, 2])
def test_any_layout_reads_any_other(tmp_path: Path, experts: int) -> None:
    writers = [Case(shard=4, expert=2, experts=experts), Case(2, 2, experts=experts)]
    readers = [
        Case(experts=experts),
        Case(shard=2, expert=2, experts=experts),
        Case(2, 1, 2, 2, experts=experts),
        Case(shard=4, expert=4 if experts == 4 else 1, experts=experts),
    ]
    for number, writer in enumerate(writers):
        root = tmp_path / str(number)
        saved = joined(run_ranks(train_and_save, 4, writer, root))
        assert any("experts" in name for name in saved)
        for reader in readers:
            loaded = joined(run_ranks(load, reader.world, reader, root, 99))
            assert loaded.keys() == saved.keys()
            assert [n for n in saved if not np.array_equal(saved[n], loaded[n])] == []


LOSS_TOLERANCE = 1e-5
"""Relative. Another layout sums gradients in another order, so steps are equal to rounding only."""


@dataclass(frozen=True, repr=False)
class Leg:
    """One rank's part of a run between two checkpoints."""

    loaded: Parts
    losses: list[float]
    saved: Parts


def leg(case: Case, source: Path, target: Path, steps: range) -> Leg:
    """Load what is in `source`, or begin; do `steps`; save in the background to `target`."""
    setup = Setup.of(case)
    store = CheckpointStore(source, keep_last=2)
    found = store.newest()
    if found:
        store.load(found, setup.tensors(), MODEL)
    store.close()
    loaded = parts_of(setup)
    losses = [setup.step(number).loss for number in steps]
    store = CheckpointStore(target, keep_last=2)
    store.start(setup.tensors(), record(steps.stop))
    store.finish()
    store.close()
    return Leg(loaded, losses, parts_of(setup))


def test_the_next_losses_after_each_change_of_layout(tmp_path: Path) -> None:
    """Four ranks with divided experts -> two that share rows and experts -> one; and at once."""
    four, two, one = Case(shard=4, expert=2), Case(context=2, expert=2), Case()
    unbroken = run_ranks(leg, 4, four, tmp_path / "none", tmp_path / "unbroken", range(14))
    expected = unbroken[0].losses
    states: dict[str, dict[str, NDArray[Any]]] = {}
    for source, target, case, steps in (
        ("none", "four", four, range(4)),
        ("four", "two", two, range(4, 14)),
        ("four", "one at once", one, range(4, 14)),
        ("four", "two for a while", two, range(4, 9)),
        ("two for a while", "one", one, range(9, 14)),
    ):
        ranks = run_ranks(leg, case.world, case, tmp_path / source, tmp_path / target, steps)
        states[target] = joined([part.saved for part in ranks])
        if source in states:
            loaded = joined([part.loaded for part in ranks])
            assert [n for n in loaded if not np.array_equal(loaded[n], states[source][n])] == []
        there = expected[steps.start : steps.stop]
        assert ranks[0].losses == pytest.approx(there, rel=LOSS_TOLERANCE), target
