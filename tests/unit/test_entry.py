"""What a resume asks of the configuration, and what it says where that cannot go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.states import record
from tests.helpers.tiny import tiny
from zaya_train.config.build import to_dict
from zaya_train.config.errors import ConfigError
from zaya_train.phases.lineage import lineage
from zaya_train.train.attempts import record_attempt
from zaya_train.train.entry import check_entry
from zaya_train.train.identity import identity_of
from zaya_train.train.manifest import Manifest
from zaya_train.train.restore import Found
from zaya_train.train.state import TrainState

CORPORA = {"problems": "aa11"}
RATE = {"optim.muon.learning_rate": 0.03}
RATIO = {"plan.phases.short.schedule.final_ratio": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    return {"run.dir": str(tmp_path)}


def found(changes: dict[str, Any], **values: Any) -> Found:
    """A checkpoint in the first phase of a run under this configuration."""
    config = tiny(changes)
    kept = {
        "train_state": TrainState().to_dict(),
        "model": to_dict(config.model),
        "lineage": lineage(config, 0, CORPORA),
        "identity": identity_of(config, CORPORA, 1, {}).to_dict(),
        **values,
    }
    made = record(3, **json.loads(json.dumps(kept)))
    return Found(Path("step-3"), Manifest(torch_version="2", files=(), tensors={}, record=made))


def refusal(checkpoint: Found, changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_entry(checkpoint, tiny(changes), CORPORA)
    return str(caught.value)


def test_a_refusal_says_by_full_key_what_can_be_named(run: dict[str, Any]) -> None:
    (key,) = RATIO
    line = refusal(found(run), {**run, **RATIO})
    assert f"{key}: 0.0 -> 0.5; restore these, say so (checkpoint.allow_changed=[{key}]) or" in line
    both = refusal(found(run), {**run, **RATIO, "run.seed": 9})
    assert "run.seed: 3 -> 9" in both and f"(checkpoint.allow_changed=[{key}])" in both
    assert "allow_changed" not in refusal(found(run), {**run, "run.seed": 9})


@pytest.mark.parametrize("change", [RATE, RATIO])
def test_what_is_named_goes_on_and_the_setting_told_keeps_names(
    run: dict[str, Any], change: dict[str, Any]
) -> None:
    (key,) = change
    others = {**run, **change, "checkpoint.allow_changed": ["guard.sigma"]}
    assert f"checkpoint.allow_changed=[guard.sigma,{key}]" in refusal(found(run), others)
    check_entry(found(run), tiny({**run, **change, "checkpoint.allow_changed": [key]}), CORPORA)


@pytest.mark.parametrize("change", [RATE, RATIO])
def test_a_name_is_needed_once_however_far_back_the_run_goes(
    run: dict[str, Any], change: dict[str, Any]
) -> None:
    """A fallback, or a guard's roll back, may take it to a checkpoint of before the change."""
    folder, old = Path(run["run.dir"]), found(run)
    record_attempt(folder, 1, to_dict(tiny(run)))
    changed = {**run, **change}
    refusal(old, changed)
    record_attempt(folder, 2, to_dict(tiny({**changed, "checkpoint.allow_changed": [*change]})))
    check_entry(old, tiny(changed), CORPORA)
    # Another value, or the old one where the checkpoint has the new one, is another change.
    refusal(old, {**run, **dict.fromkeys(change, 0.25)})
    refusal(found(changed), run)
    # What no name could allow is not accepted because an attempt had it.
    record_attempt(folder, 3, to_dict(tiny({**run, "run.seed": 9})))
    refusal(old, {**run, "run.seed": 9})


def test_a_checkpoint_without_identity_is_taken_with_a_warning(
    run: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    check_entry(found(run), tiny(run), CORPORA)
    assert caplog.messages == []
    check_entry(found(run, identity={}), tiny({**run, **RATE}), CORPORA)
    (message,) = caplog.messages
    assert "step-3: written by a version that kept no identity" in message
