"""SIGTERM to one rank in every part of a step: all save and exit 75, and nothing is lost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.runs import Launched, last_step, make_corpora, overrides_for, values_for
from zaya_train.run import CHECKPOINTS
from zaya_train.runtime.beats import DIRECTORY, beat_path, read_beat
from zaya_train.tools.compare import compare_runs
from zaya_train.train.restore import find_newest

if TYPE_CHECKING:
    from pathlib import Path

CHANGES: dict[str, Any] = {
    "plan.phases.short.schedule": {"kind": "constant"},
    "plan.phases.long.tokens": 2 * 128,
    "checkpoint.every_steps": 3,
    "logging.eval_every_steps": 3,
    "data.prefetch_batches": 1,
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpus"))


def uninterrupted(words: list[str], folder: Path) -> None:
    launched = Launched(words, folder, ranks=2)
    assert launched.wait(400) == [0, 0], launched.output()


def stop_in(part: str, run_dir: Path, words: list[str], folder: Path) -> None:
    """Start the run, send SIGTERM to one rank when it is in this part, and see all end well."""
    folder.mkdir()
    os.environ[DIRECTORY] = str(folder)
    try:
        launched = Launched(words, folder, ranks=2)
    finally:
        del os.environ[DIRECTORY]
    rank = len(part) % 2
    while True:
        beat = read_beat(beat_path(folder, rank))
        if beat and beat.phase == part:
            break
        assert all(process.is_alive() for process in launched.processes), launched.output()
    launched.processes[rank].terminate()
    assert launched.wait(300) == [75, 75], launched.output()
    found, skipped = find_newest(run_dir / CHECKPOINTS)
    assert found is not None and skipped == {}
    # Not a step is lost.
    assert found.record.step == last_step(run_dir)


def stop_in_turn(parts: list[str], steps: int, corpora: Path, tmp_path: Path) -> None:
    """Stop one run in these parts, one after the other; it ends as one that was left alone."""
    changes = {**CHANGES, "plan.phases.short.tokens": steps * 4 * 64}
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    words = overrides_for(values_for(run_dir, corpora, changes))
    for number, part in enumerate(parts):
        stop_in(part, run_dir, words, tmp_path / f"{number}-{part}")
    uninterrupted(words, tmp_path / "last")
    uninterrupted(overrides_for(values_for(whole, corpora, changes)), tmp_path / "out-whole")
    comparison = compare_runs(run_dir, whole)
    assert comparison.equal, comparison.text()


def test_stopped_while_loading_training_evaluating_and_saving(
    corpora: Path, tmp_path: Path
) -> None:
    stop_in_turn(["load", "backward", "evaluate", "save"], 14, corpora, tmp_path)


@pytest.mark.nightly
def test_stopped_ten_times_in_every_part_of_a_step(corpora: Path, tmp_path: Path) -> None:
    parts = ["load", "data", "forward", "backward", "exchange"]
    parts += ["optimizer", "evaluate", "save", "data", "save"]
    stop_in_turn(parts, 40, corpora, tmp_path)
