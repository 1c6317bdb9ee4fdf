"""SIGTERM to one rank in every part of a step: all save and exit 75, and nothing is lost.

The rank signals itself when it says that the part begins: no clock decides where it is hit.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from tests.integration.runs import Launched, last_step, left_alone, overrides_for, values_for
from zaya_train.run import CHECKPOINTS
from zaya_train.runtime.heartbeat import Heartbeat
from zaya_train.tools.compare import compare_runs
from zaya_train.train.restore import find_newest
from zaya_train.train.saving import Saver

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.train.manifest import CheckpointRecord

CHANGES: dict[str, Any] = {
    "plan.phases.short.schedule": {"kind": "constant"},
    "plan.phases.long.tokens": 2 * 128,
    "checkpoint.every_steps": 3,
    "logging.eval_every_steps": 3,
    "data.prefetch_batches": 1,
}


def uninterrupted(words: list[str], folder: Path) -> None:
    launched = Launched(words, folder, ranks=2)
    assert launched.wait() == [0, 0], launched.output()


def stop_in(part: str, run_dir: Path, words: list[str], folder: Path) -> None:
    """Start the run, send SIGTERM to one rank when it is in this part, and see all end well."""
    mark, rank = Heartbeat.mark, len(part) % 2

    def marked(heartbeat: Heartbeat, phase: str, step: int | None = None) -> None:
        mark(heartbeat, phase, step)
        # Without a step: a save that is waited for.
        if phase == part and (step or part == "load") and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heartbeat, "mark", marked)
        launched = Launched(words, folder, ranks=2)
    assert launched.wait() == [75, 75], launched.output()
    found, skipped = find_newest(run_dir / CHECKPOINTS)
    assert found is not None and skipped == {}
    # Not a step is lost.
    assert found.record.step == last_step(run_dir)


def stop_in_turn(parts: list[str], steps: int, corpora: Path, tmp_path: Path) -> None:
    """Stop one run in these parts, one after the other; it ends as one that was left alone."""
    changes = {**CHANGES, "plan.phases.short.tokens": steps * 4 * 64}
    run_dir = tmp_path / "run"
    words = overrides_for(values_for(run_dir, corpora, changes))
    for number, part in enumerate(parts):
        stop_in(part, run_dir, words, tmp_path / f"{number}-{part}")
    uninterrupted(words, tmp_path / "last")
    comparison = compare_runs(run_dir, left_alone(tmp_path / "whole", corpora, changes, ranks=2))
    assert comparison.equal, comparison.text()


def test_stopped_while_loading_evaluating_and_saving(corpora: Path, tmp_path: Path) -> None:
    stop_in_turn(["load", "evaluate", "save"], 11, corpora, tmp_path)


def test_stopped_while_a_phase_is_saved_leaves_the_next_to_the_next_attempt(
    corpora: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    changes = {**CHANGES, "plan.phases.short.tokens": 2 * 4 * 64}
    words = overrides_for(values_for(run_dir, corpora, changes))
    save = Saver.save

    def saved(saver: Saver, tensors: Any, record: CheckpointRecord, required: bool) -> None:
        if record.keep and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        save(saver, tensors, record, required)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", saved)
        launched = Launched(words, tmp_path / "stopped", ranks=2)
        assert launched.wait() == [75, 75], launched.output()
        found, _ = find_newest(run_dir / CHECKPOINTS)
        assert found is not None and (found.record.step, found.record.phase_index) == (2, 1)
        # The last phase has none behind it: the run is done, whatever it heard.
        uninterrupted(words, tmp_path / "last")


@pytest.mark.nightly
def test_stopped_ten_times_in_every_part_of_a_step(corpora: Path, tmp_path: Path) -> None:
    parts = ["load", "data", "forward", "backward", "exchange"]
    parts += ["optimizer", "evaluate", "save", "data", "save"]
    stop_in_turn(parts, 40, corpora, tmp_path)
