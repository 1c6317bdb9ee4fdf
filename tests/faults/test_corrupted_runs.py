"""Runs whose checkpoints were damaged fall back, say why, and end as the unbroken run; or do not
start."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.faults.test_corruption import CORRUPTIONS
from tests.integration.runs import Launched, overrides_for, values_for
from zaya_train.run import CHECKPOINTS
from zaya_train.tools.compare import compare_runs
from zaya_train.train.metrics import read_metrics
from zaya_train.train.restore import verify
from zaya_train.train.storage import list_steps, step_name

if TYPE_CHECKING:
    from pathlib import Path

RANKS = 2
TRIALS = 200
ALL_BAD_EVERY = 10
"""Trials in which every checkpoint is damaged."""


def launch(run_dir: Path, corpora: Path) -> tuple[list[int | None], str]:
    words = overrides_for(values_for(run_dir, corpora))
    launched = Launched(words, run_dir.with_name("out"), ranks=RANKS)
    return launched.wait(), launched.output()


def damage_and_resume(unbroken: Path, corpora: Path, folder: Path, trial: int) -> None:
    run_dir, rng = folder / "run", random.Random(trial)
    shutil.copytree(unbroken, run_dir)
    root = run_dir / CHECKPOINTS
    steps = list_steps(root)
    everything = trial % ALL_BAD_EVERY == 0
    for step in steps[1:] if everything else steps[-1:]:
        corrupt = CORRUPTIONS[rng.randrange(len(CORRUPTIONS))]
        corrupt(root / step_name(step), rng)
    if everything:
        # The oldest last: others take stale files from it.
        (root / step_name(steps[0]) / "MANIFEST.json").unlink()
    problems = {step: verify(root / step_name(step)) for step in steps}
    codes, output = launch(run_dir, corpora)
    if everything:
        assert all(problems.values()), f"trial {trial}: {problems}"
        assert codes == [3] * RANKS, f"trial {trial}: {output}"
        assert "no usable checkpoint" in output
        assert all(step_name(step) in output for step in steps)
        return
    assert codes == [0] * RANKS, f"trial {trial}: {output}"
    assert problems.pop(steps[-1]), f"trial {trial}: not detected"
    log = (run_dir / "logs" / "rank-0.log").read_text()
    assert f"skipping checkpoint {step_name(steps[-1])}: " in log, f"trial {trial}"
    resumed = [row["step"] for row in read_metrics(run_dir) if row["kind"] == "resume"]
    assert resumed == [steps[-2]], f"trial {trial}"
    comparison = compare_runs(run_dir, unbroken)
    assert comparison.equal, f"trial {trial}: {comparison.text()}"


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_every_damaged_run_falls_back_or_stops(
    unbroken: Path, corpora: Path, tmp_path: Path
) -> None:
    for trial in range(TRIALS):
        damage_and_resume(unbroken, corpora, tmp_path / str(trial), trial)
        shutil.rmtree(tmp_path / str(trial))


@pytest.mark.parametrize("trial", [0, 1])
def test_a_damaged_run_falls_back_or_stops(
    unbroken: Path, corpora: Path, tmp_path: Path, trial: int
) -> None:
    damage_and_resume(unbroken, corpora, tmp_path, trial)
