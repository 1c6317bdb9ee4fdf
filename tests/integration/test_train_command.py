"""`zaya train` as a command: refusals before anything is written, Hydra's features, torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.helpers.paths import REPOSITORY
from tests.integration.runs import (
    ENVIRONMENT,
    Launched,
    make_corpora,
    overrides_for,
    values_for,
    zaya,
)
from zaya_train.tools.compare import compare_runs
from zaya_train.train.metrics import read_metrics

if TYPE_CHECKING:
    from pathlib import Path

SHORT = {
    "parallel.context_parallel_limit": 1,
    "plan.phases.short.tokens": 512,
    "plan.phases.short.schedule": {"kind": "constant"},
    "plan.phases.long.tokens": 256,
    "logging.eval_every_steps": 0,
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpus"))


def test_bad_value_exits_2_with_one_line_and_writes_nothing(tmp_path: Path) -> None:
    words = ["recipe=smoke_cpu", "run.dir=run", "plan.phases.midtrain.context_tokens=1000"]
    done = subprocess.run(
        [sys.executable, "-m", "zaya_train", "train", *words],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: plan.phases.midtrain.global_batch_tokens: 2048 is not a multiple"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["model.hiden_size=3"], "model.hiden_size"),
        (["model.hidden_size=abc"], "model.hidden_size: expected int, got str 'abc'"),
        (["optim.muon.learning_rate=nan"], "optim.muon.learning_rate: nan must be positive"),
        (["recipe=nope"], "recipe=nope: no such recipe"),
        (["model.hidden_size=[1"], "[1"),
        (["model.vocab_size=200"], "model.vocab_size: 200 is smaller than the 264 ids"),
        (["data.sources.problems.path=nowhere"], "nowhere: not a corpus"),
        (["data.validation.problems.path=nowhere"], "nowhere: not a corpus"),
        (["runtime.memory_gb=0.000001"], "90% of runtime.memory_gb=1e-06"),
    ],
)
def test_refusals_are_one_line_and_leave_no_run_directory(
    changes: list[str], told: str, corpora: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = overrides_for(values_for(run_dir, corpora, SHORT))
    log = tmp_path / "log"
    assert zaya(["train", *words, *changes], log) == 2
    (line,) = log.read_text().splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert not run_dir.exists()


def test_bad_launch_environment_is_a_config_error(corpora: Path, tmp_path: Path) -> None:
    words = overrides_for(values_for(tmp_path / "run", corpora, SHORT))
    launched = Launched(words, tmp_path / "out")
    assert launched.wait() == [0], launched.output()
    words = [*words, f"run.dir={tmp_path / 'other'}"]
    log = tmp_path / "log"
    os.environ["WORLD_SIZE"] = "two"
    try:
        assert zaya(["train", *words], log) == 2
    finally:
        del os.environ["WORLD_SIZE"]
    assert "WORLD_SIZE='two' is not an integer" in log.read_text()


def test_a_crash_is_no_configuration_error(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("zaya_train.run.run_phase", broken)
    words = overrides_for(values_for(tmp_path / "run", corpora, SHORT))
    log = tmp_path / "log"
    assert zaya(["train", *words], log) == 1
    assert "RuntimeError: a bug" in log.read_text()


def test_cfg_job_prints_the_run_and_trains_nothing(corpora: Path, tmp_path: Path) -> None:
    words = overrides_for(values_for(tmp_path / "run", corpora, SHORT))
    log = tmp_path / "log"
    assert zaya(["train", *words, "--cfg", "job"], log) == 0
    text = log.read_text()
    assert "  hidden_size: 16\n" in text
    assert "  newton_schulz_steps: 5\n" in text  # a default of the schema
    assert not (tmp_path / "run").exists()


def test_multirun_trains_two_jobs_in_directories_of_their_own(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = overrides_for(values_for(tmp_path / "sweep", corpora, SHORT))
    log = tmp_path / "log"
    assert zaya(["train", "--multirun", *words, "run.seed=1,2"], log) == 0, log.read_text()
    runs = [tmp_path / "sweep" / number for number in ("0", "1")]
    for run_dir in runs:
        assert read_metrics(run_dir)[-1]["kind"] == "done"
    assert not compare_runs(*runs).equal


def test_a_failing_job_of_a_sweep_is_told_in_the_exit_code(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = overrides_for(values_for(tmp_path / "sweep", corpora, SHORT))
    log = tmp_path / "log"
    assert zaya(["train", "--multirun", *words, "run.seed=-1,2"], log) == 2
    assert "run.seed: -1" in log.read_text()
    assert read_metrics(tmp_path / "sweep" / "1")[-1]["kind"] == "done"


def test_torchrun_trains_as_one_process_does(corpora: Path, tmp_path: Path) -> None:
    alone = Launched(
        overrides_for(values_for(tmp_path / "alone", corpora, SHORT)), tmp_path / "alone-out"
    )
    assert alone.wait() == [0], alone.output()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = overrides_for(values_for(tmp_path / "torchrun", corpora, SHORT))
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "zaya_train", "train", *words],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    curves = [
        [row["loss"] for row in read_metrics(tmp_path / name) if row["kind"] == "step"]
        for name in ("alone", "torchrun")
    ]
    assert len(curves[0]) == 3
    begun = [r for r in read_metrics(tmp_path / "torchrun") if r.get("event") == "begin"]
    assert len(begun) == 2
    assert all(r["expected_peak_bytes"] > 1e5 and r["expected_by"] for r in begun)
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
