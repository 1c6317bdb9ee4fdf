"""The guard in real runs of two ranks: what one rank spoils is skipped on all, recorded, survived.

The faults are injected here, into the model of a forked rank, not through a setting.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from tests.integration.runs import Launched, overrides_for, values_for
from zaya_train.data.ledger import StepEntry, read_ledger
from zaya_train.model.zaya import ZayaModel
from zaya_train.run import CHECKPOINTS
from zaya_train.tools.compare import compare_runs
from zaya_train.train.metrics import read_metrics
from zaya_train.train.restore import load_full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

CHANGES: dict[str, Any] = {
    "plan.phases.short.tokens": 14 * 4 * 64,
    "plan.phases.short.schedule": {"kind": "constant"},
    "plan.phases.long.tokens": 2 * 128,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 30,
    "logging.eval_every_steps": 0,
    "guard.window_steps": 4,
    # The tiny model's norms move by tens of per cent.
    "guard.sigma": 20.0,
}


class Spoiled:
    """While `patch` lasts, forward passes by number -> what multiplies the loss of rank 1 there."""

    def __init__(self, patch: pytest.MonkeyPatch, factors: Mapping[int, float]) -> None:
        forward: Callable[..., Any] = ZayaModel.forward
        count = 0

        def spoiled(model: ZayaModel, *inputs: Any) -> Any:
            nonlocal count
            out = forward(model, *inputs)
            if out.loss.requires_grad:
                count += 1
                if count in factors and dist.get_rank() == 1:
                    return replace(out, loss=out.loss * factors[count])
            return out

        patch.setattr(ZayaModel, "forward", spoiled)


def run(words: list[str], folder: Path) -> tuple[list[int | None], str]:
    launched = Launched(words, folder, ranks=2)
    return launched.wait(), launched.output()


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "incidents.jsonl").read_text().splitlines()]


def states(run_dir: Path, step: int) -> dict[str, Tensor]:
    return load_full(run_dir / CHECKPOINTS / f"step-{step:08d}")


def in_steps(factors: Mapping[int, float]) -> dict[int, float]:
    """By forward pass: two data ranks take two micro-batches of one row each in every step."""
    return {n: factor for step, factor in factors.items() for n in (2 * step - 1, 2 * step)}


BAD_STEPS = in_steps({10: math.nan, 12: 1e4, 14: 1e4})
"""The last one ends a phase, whose end is saved all the same."""


@pytest.fixture(scope="module")
def spoiled(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with a step that is not finite and two whose gradients are spikes."""
    folder = tmp_path_factory.mktemp("spoiled")
    with pytest.MonkeyPatch.context() as patch:
        Spoiled(patch, BAD_STEPS)
        codes, output = run(overrides_for(values_for(folder / "run", corpora, CHANGES)), folder)
    assert codes == [0, 0], output
    yield folder / "run"


def test_bad_steps_of_one_rank_are_skipped_on_all_and_recorded(spoiled: Path) -> None:
    applied = [row["applied"] for row in read_metrics(spoiled) if row["kind"] == "step"]
    assert applied == [True] * 9 + [False, True, False, True, False, True]
    # Nothing is saved while steps are skipped but the phase's end.
    saved = {int(path.name[5:]) for path in (spoiled / CHECKPOINTS).glob("step-*")}
    assert saved == set(range(1, 16)) - {10, 12}
    nan, spike, last = incidents(spoiled)
    for record in (nan, spike, last):
        assert (record["kind"], record["action"]) == ("skipped_step", "skipped")
        first = 4 * (record["step"] - 1)
        assert record["rows"] == [first, first + 4]
        dealt = record["rows_by_data_rank"]
        assert sorted(dealt[0] + dealt[1]) == list(range(first, first + 4))
        assert len(record["norm_history"]) == 4 and "layers.1.moe" in record["layer_norms"]
    assert (nan["step"], nan["reason"], nan["loss_ranks"]) == (10, "loss not finite", [1])
    assert nan["suspect_rows"] == nan["rows_by_data_rank"][1] and nan["not_finite"]
    assert (spike["step"], spike["reason"], spike["loss_ranks"]) == (12, "gradient spike", [])
    assert spike["grad_norm"] > spike["norm_limit"] > max(spike["norm_history"])
    assert spike["rank_losses"][1] > 100 * spike["rank_losses"][0]


def test_a_skipped_step_moves_nothing(spoiled: Path) -> None:
    # Weights, momenta, moments, biases and counters, bit for bit; step 13 has moved them.
    older, before, after = (states(spoiled, step) for step in (11, 13, 14))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not any(torch.equal(older[name], before[name]) for name in before if "model" in name)


@pytest.mark.nightly
def test_killed_behind_a_skipped_step_the_run_decides_as_if_it_had_lived(
    spoiled: Path, corpora: Path, tmp_path: Path
) -> None:
    """The window of norms is in the checkpoint, so the spike of step 12 is one for the second
    process as well, which has seen at most one step of its own."""
    run_dir = tmp_path / "run"
    words = overrides_for(values_for(run_dir, corpora, CHANGES))
    with pytest.MonkeyPatch.context() as patch:
        Spoiled(patch, BAD_STEPS)
        launched = Launched(words, tmp_path / "killed", ranks=2).at_step(run_dir, 11)
        launched.kill()
    for step in range(11, 16):
        rmtree(run_dir / CHECKPOINTS / f"step-{step:08d}", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        # The second process begins with step 10.
        Spoiled(patch, in_steps({1: math.nan, 3: 1e4, 5: 1e4}))
        codes, output = run(words, tmp_path / "again")
    assert codes == [0, 0], output
    (resume,) = (row for row in read_metrics(run_dir) if row["kind"] == "resume")
    assert resume["step"] == 9
    comparison = compare_runs(run_dir, spoiled)
    assert comparison.equal, comparison.text()
    assert incidents(run_dir)[-1]["norm_limit"] == incidents(spoiled)[-1]["norm_limit"]


def test_too_many_in_a_row_stop_the_run_with_good_checkpoints(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    changes = {**CHANGES, "guard.most_skipped": 3, "checkpoint.keep_last": 2}
    with monkeypatch.context() as patch:
        Spoiled(patch, dict.fromkeys(range(9, 99), math.nan))
        codes, output = run(overrides_for(values_for(run_dir, corpora, changes)), tmp_path / "out")
    assert codes == [5, 5], output
    assert "step 7: 3 steps in a row skipped" in output and "incidents.jsonl" in output
    saved = sorted(path.name for path in (run_dir / CHECKPOINTS).glob("step-*"))
    assert saved == ["step-00000003", "step-00000004"]
    assert [record["action"] for record in incidents(run_dir)] == ["skipped"] * 2 + ["stopped"]


def test_a_second_roll_back_from_the_same_checkpoint_remembers_the_first(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    changes = {
        **CHANGES,
        "guard.most_skipped": 2,
        "guard.at_limit": "roll_back",
        "guard.most_roll_backs": 2,
        "checkpoint.every_steps": 10,
    }
    with monkeypatch.context() as patch:
        Spoiled(patch, dict.fromkeys(range(5, 99), math.nan))
        codes, output = run(overrides_for(values_for(run_dir, corpora, changes)), tmp_path / "out")
    assert codes == [5, 5], output
    undone = [row["rolled_back"] for row in read_metrics(run_dir) if row["kind"] == "resume"]
    # From the start again, both times; the third streak finds no roll back left.
    assert undone == [[8, 16], [0, 8]]
    assert incidents(run_dir)[-1]["action"] == "stopped"


def test_rolled_back_rows_are_passed_over_and_the_ledger_still_proves_them(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    changes = {
        **CHANGES,
        "guard.most_skipped": 2,
        "guard.at_limit": "roll_back",
        "checkpoint.every_steps": 3,
    }
    with monkeypatch.context() as patch:
        Spoiled(patch, in_steps({5: math.nan, 6: math.nan}))
        codes, output = run(overrides_for(values_for(run_dir, corpora, changes)), tmp_path / "out")
    assert codes == [0, 0], output
    rows = read_metrics(run_dir)
    (resume,) = (row for row in rows if row["kind"] == "resume")
    assert (resume["step"], resume["rolled_back"]) == (3, [16, 24])
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 16))
    passed = [row["step"] for row in steps if row.get("reason") == "rows passed over"]
    assert passed == [5, 6]
    assert [row["step"] for row in steps if not row["applied"]] == [5, 6]
    entries = [entry for entry in read_ledger(run_dir) if isinstance(entry, StepEntry)]
    assert [entry.step for entry in entries] == list(range(1, 16))
    assert [(entry.first, entry.rows) for entry in entries[4:6]] == [(16, 4), (20, 4)]
