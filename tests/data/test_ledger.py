"""A ledger opened again: it stands where the checkpoint does, or says why it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from zaya_train.config.errors import DataError
from zaya_train.data.ledger import LedgerWriter, PhaseEntry, read_ledger

if TYPE_CHECKING:
    from pathlib import Path


def written(run_dir: Path, begins: int, ends: int) -> None:
    """A process that resumes at step `begins` and makes the steps up to `ends`, a row each."""
    writer = LedgerWriter(run_dir, enabled=True)
    writer.phase(PhaseEntry("short", begins, {}), begins)
    for step in range(begins + 1, ends + 1):
        writer.step(step, step, fingerprint=step)
    writer.sync()
    writer.close()


def steps(run_dir: Path) -> list[int]:
    return [entry.step for entry in read_ledger(run_dir)]


def test_steps_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    written(tmp_path, 0, 5)
    written(tmp_path, 3, 4)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


def test_a_branched_run_that_made_no_step_can_start_again(tmp_path: Path) -> None:
    """Its phase ended at the checkpoint it began from."""
    written(tmp_path, 8, 8)
    written(tmp_path, 8, 10)
    assert steps(tmp_path) == [8, 9, 10]


@pytest.mark.parametrize(("begins", "ends"), [(0, 3), (2, 3)])
def test_a_ledger_behind_its_checkpoint_is_refused(tmp_path: Path, begins: int, ends: int) -> None:
    written(tmp_path, begins, ends)
    with pytest.raises(DataError, match="ends at step 3, the checkpoint is at step 5"):
        written(tmp_path, 5, 6)
