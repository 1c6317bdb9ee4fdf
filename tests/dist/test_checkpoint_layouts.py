"""A checkpoint of one layout, experts divided or not, loads bitwise into any other."""

from __future__ import annotations

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
