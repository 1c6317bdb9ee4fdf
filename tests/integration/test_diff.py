"""`zaya diff` on real runs: what it promises about two curves is what the two curves do."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.tiny import PHASE, changed
from tests.integration.runs import Launched, make_corpora, overrides_for, values_for, zaya
from zaya_train.config.build import build
from zaya_train.config.frozen import frozen
from zaya_train.config.schema import TrainConfig
from zaya_train.main import main
from zaya_train.run import CHECKPOINTS
from zaya_train.train.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHORT = {
    "plan.phases": {"short": {**PHASE, "tokens": 4 * 256}},
    "parallel.context_parallel_limit": 1,
    "checkpoint.every_steps": 2,
}
SPEED = {"kernels.attention": "reference", "plan.phases.short.micro_batch_sequences": 2}
MATH = {"optim.muon.learning_rate": 0.01}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpus"))


Runs = dict[str, "Path"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Runs:
    """One run, and others that differ from it in a speed key or a math key."""
    folder = tmp_path_factory.mktemp("runs")
    launched = {}
    for name, changes in (("base", {}), ("speed", SPEED), ("math", MATH)):
        values = values_for(folder / name / "run", corpora, {**SHORT, **changes})
        launched[name] = Launched(overrides_for(values), folder / name)
    for run in launched.values():
        assert run.wait() == [0], run.output()
    return {name: folder / name / "run" for name in launched}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if row["kind"] == "step"]


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    def compare(first: Path, second: Path) -> tuple[int, dict[str, Any]]:
        code = main(["diff", str(first), str(second), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return compare


def freeze(run: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The run's configuration with changes, frozen as a job's."""
    values = changed(json.loads((run / "config.json").read_text()), changes)
    path = folder / "frozen.json"
    path.write_text(json.dumps(frozen(build(TrainConfig, values))))
    return path


def found(result: dict[str, Any], effect: str) -> dict[str, tuple[Any, Any]]:
    return {
        f["key"]: (f["first"], f["second"]) for f in result["findings"] if f["effect"] == effect
    }


def test_a_speed_key_leaves_the_curve_to_rounding(runs: Runs, diff: Any) -> None:
    code, result = diff(runs["base"], runs["speed"])
    assert (code, result["same"], result["effect"]) == (0, True, "rounding")
    assert found(result, "rounding") == {
        "kernels.attention": ("eager", "reference"),
        "plan.phases.short.micro_batch_sequences": (1, 2),
    }
    assert set(found(result, "none")) == {"run.dir"}
    assert result["unknown"] == []
    assert losses(runs["speed"]) == pytest.approx(losses(runs["base"]), rel=1e-5)
    assert losses(runs["speed"]) != losses(runs["base"])


def test_a_math_key_is_named_with_both_values(runs: Runs, diff: Any) -> None:
    code, result = diff(runs["base"], runs["math"])
    assert (code, result["same"]) == (1, False)
    assert found(result, "curve") == {"optim.muon.learning_rate": (0.02, 0.01)}
    assert losses(runs["math"]) != pytest.approx(losses(runs["base"]), rel=1e-5)


def test_checkpoints_and_configurations_are_compared_too(
    runs: Runs, tmp_path: Path, diff: Any
) -> None:
    newest = [run / CHECKPOINTS / "step-00000004" for run in runs.values()]
    assert diff(newest[0], newest[1])[0] == 0
    assert found(diff(newest[0], newest[2])[1], "curve") == {
        "optim.muon.learning_rate": (0.02, 0.01)
    }
    file = freeze(runs["base"], tmp_path, {"run.dir": "elsewhere"})
    code, result = diff(file, runs["base"])
    assert (code, result["findings"][0]["key"]) == (0, "run.dir")
    # The corpus is here, so what it holds is known; what the job will run on is not.
    assert result["unknown"] == ["versions (code, torch, device)", "ranks"]


def test_data_code_and_versions_count_and_what_is_not_recorded_is_said(
    runs: Runs, tmp_path: Path, diff: Any
) -> None:
    other = tmp_path / "run"
    shutil.copytree(runs["base"], other)
    manifest = json.loads((other / "run.json").read_text())
    attempt = manifest["attempts"][0]
    for changes, key, effect in (
        ({"corpora": {"problems": "feed"}}, "data.sources.problems", "curve"),
        ({"versions": {**attempt["versions"], "code": "feed"}}, "code", "curve"),
        ({"versions": {**attempt["versions"], "torch": "9.9"}}, "torch", "rounding"),
        ({"world_size": 2}, "ranks", "rounding"),
    ):
        (other / "run.json").write_text(json.dumps({"attempts": [{**attempt, **changes}]}))
        code, result = diff(runs["base"], other)
        assert code == int(effect == "curve")
        assert list(found(result, effect)) == [key]
    (other / "run.json").unlink()
    code, result = diff(runs["base"], other)
    assert (code, len(result["unknown"])) == (0, 2)


def test_ranks_matter_where_they_decide_how_many_rows_a_step_has(
    runs: Runs, tmp_path: Path, diff: Any
) -> None:
    """The last step is rounded up to work for all ranks: 3 rows are left, on 2 ranks it takes 4."""
    sides = []
    for world in (1, 2):
        run = tmp_path / str(world)
        shutil.copytree(runs["base"], run)
        manifest = json.loads((run / "run.json").read_text())
        manifest["attempts"][0]["world_size"] = world
        (run / "run.json").write_text(json.dumps(manifest))
        path = run / "configs" / "attempt-0001.json"
        config = json.loads(path.read_text())
        config["plan"]["phases"]["short"]["tokens"] -= 64
        path.write_text(json.dumps(config))
        sides.append(run)
    code, result = diff(*sides)
    assert code == 1
    assert found(result, "curve") == {
        "plan.phases.short: rows of its steps": ("last step 3", "last step 4")
    }


def test_an_attempt_that_changed_something_counts_from_its_step(
    runs: Runs, tmp_path: Path, corpora: Path, diff: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["base"], run)
    shutil.rmtree(run / CHECKPOINTS / "step-00000004")
    changes = {**SHORT, **MATH, "checkpoint.allow_changed": ["optim.muon.learning_rate"]}
    words = overrides_for(values_for(run, corpora, changes))
    assert zaya(["train", *words], tmp_path / "out") == 0, (tmp_path / "out").read_text()
    code, result = diff(runs["base"], run)
    assert code == 1
    (finding,) = (f for f in result["findings"] if f["effect"] == "curve")
    assert (finding["key"], finding["after_step"]) == ("optim.muon.learning_rate", 2)
    assert losses(run)[:2] == losses(runs["base"])[:2]
    assert losses(run)[3] != losses(runs["base"])[3]


def test_what_lies_in_later_phases_leaves_the_first_ones_the_same(
    runs: Runs, tmp_path: Path, diff: Any
) -> None:
    file = freeze(runs["base"], tmp_path, {"plan.phases.long": {**PHASE, "rope_base": 1e5}})
    code, result = diff(runs["base"], file)
    assert (code, result["common_phases"]) == (1, ["short"])
    assert all(key.startswith("plan.phases.long.") for key in found(result, "curve"))


def test_what_is_neither_is_refused(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(tmp_path), str(runs["base"])]) == 2
    assert "no run, no checkpoint and no configuration" in capsys.readouterr().err


def test_people_read_a_verdict(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(runs["base"]), str(runs["speed"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "the two must give the same loss curve, to rounding"
    assert "1 difference that changes no number; --json lists it all" in lines
    assert main(["diff", str(runs["base"]), str(runs["math"])]) == 1
    out = capsys.readouterr().out
    assert "optim.muon.learning_rate" in out and "0.02" in out and "0.01" in out
