"""An export says whether its run had finished its plan."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from tests.helpers.tiny import tiny
from zaya_train.config.build import to_dict
from zaya_train.phases.lineage import lineage
from zaya_train.tools.export_progress import progress, unfinished_line
from zaya_train.tools.export_receipt import PAGE, read_receipt
from zaya_train.tools.transfer import ExportRequest, export_hf
from zaya_train.train.state import TrainState

from ..helpers.models import TINY, random_model
from ..helpers.saved_run import made_record, save_run

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.model import ZayaModel
    from zaya_train.train.manifest import CheckpointRecord

STATES = {
    # Of 32 rows of `short` and 10 of `long`: phase, state, what was left.
    "within the first": ("short", TrainState(9, 0, 9, 31), "96.8% of phase short, nothing of long"),
    "at the first's end": ("short", TrainState(9, 1, 0, 0), "100% of phase short, nothing of long"),
    "within the last": ("long", TrainState(12, 1, 3, 4), "40% of phase long"),
    "at the last's end": ("long", TrainState(15, 2, 0, 0), ""),
    "before any step": ("short", TrainState(), "0% of phase short, nothing of long"),
}


def model_of(phase: str) -> ZayaModel:
    base = tiny().plan.phases[phase].rope_base
    return random_model(replace(TINY, num_layers=2, vocab_size=264, rope_base=base))


def record_of(phase: str, state: TrainState) -> CheckpointRecord:
    """As a run saves it and a manifest gives it back: keys sorted."""
    config = tiny()
    past = lineage(config, state.phase_index - int(state.phase_rows == 0), {"problems": "c0ffee"})
    config_read = json.loads(json.dumps(to_dict(config), sort_keys=True))
    return replace(
        made_record(model_of(phase)),
        phase_name=phase,
        phase_index=state.phase_index,
        lineage=past,
        train_state=state.to_dict(),
        identity={"config": config_read},
    )


@pytest.mark.parametrize("name", STATES)
def test_what_was_left_of_the_plan(name: str) -> None:
    phase, state, said = STATES[name]
    run = {"phase": phase, **progress(record_of(phase, state))}
    assert run["finished"] is (not said)
    line = unfinished_line({"run": run})
    assert line == (said and f"UNFINISHED: the run's plan was not done: {said}")


def test_a_checkpoint_that_does_not_tell_is_not_judged() -> None:
    run = progress(made_record(random_model(TINY)))
    assert run["finished"] is None and unfinished_line({"run": run}) == ""


@pytest.mark.parametrize("name", ["within the last", "at the last's end"])
def test_the_command_and_the_receipt_say_so(name: str, tmp_path: Path) -> None:
    phase, state, said = STATES[name]
    run = save_run(tmp_path / "run", model_of(phase), record_of(phase, state))
    console = Console(file=io.StringIO(), record=True, width=200)
    export_hf(ExportRequest(run, tmp_path / "out", verify=None), console)
    page = (tmp_path / "out" / PAGE).read_text("utf-8")
    assert read_receipt(tmp_path / "out")["run"]["finished"] is (not said)
    assert f"| plan | {'not done' if said else 'done'} |" in page
    for text in (console.export_text(), page):
        assert ("UNFINISHED" in text and said in text) if said else "UNFINISHED" not in text
