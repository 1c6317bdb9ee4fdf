"""launch/torchrun.sh with real ranks: exit codes and signals pass through torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.paths import REPOSITORY
from tests.integration.runs import ENVIRONMENT, last_step, make_corpora, overrides_for, values_for
from zaya_train.tools.launch import kill_tree
from zaya_train.train.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STEPS = {
    "plan.phases.short.tokens": 2000 * 256,
    "plan.phases.short.schedule": {"kind": "constant"},
    "logging.eval_every_steps": 0,
    "checkpoint.every_steps": 100000,
}


@contextmanager
def started(words: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """The script with these arguments; ended with everything below it."""
    environment = {**ENVIRONMENT, "NPROC_PER_NODE": "2", "PYTHON": sys.executable, **variables}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(REPOSITORY / "launch" / "torchrun.sh"), *words],
            env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)]
)
def test_a_signal_to_the_script_stops_the_ranks_at_a_checkpoint(
    tmp_path: Path, number: signal.Signals
) -> None:
    corpora, run_dir = make_corpora(tmp_path / "corpora"), tmp_path / "run"
    log = tmp_path / "log"
    with started(overrides_for(values_for(run_dir, corpora, STEPS)), log) as process:
        while last_step(run_dir) < 3:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(300) == 75, log.read_text()
    rows: list[dict[str, Any]] = read_metrics(run_dir)
    saved = [row["step"] for row in rows if row["kind"] == "checkpoint"]
    assert saved == [last_step(run_dir)] and saved[0] < 2000


def test_the_ranks_exit_code_and_the_environment_come_through(tmp_path: Path) -> None:
    """2, of a wrong value; and a preflight in the environment of the table."""
    log = tmp_path / "log"
    words = ["recipe=smoke_cpu", "run.seed=x", f"run.dir={tmp_path / 'run'}"]
    with started(words, log) as bad:
        assert bad.wait(300) == 2, log.read_text()
    assert "run.seed" in log.read_text()
    report = tmp_path / "report.json"
    words = ["preflight", "--directory", str(tmp_path), "--output", str(report), "--device", "cpu"]
    with started(words, log, CLUSTER="mi300x_pollara") as fit:
        assert fit.wait(300) == 0, log.read_text()
    findings = json.loads(report.read_text())["findings"]
    same = {f["value"] for f in findings if f["check"] == "environment"}
    assert "NCCL_IB_GID_INDEX = 1" in same and "GPU_MAX_HW_QUEUES = 2" in same
    assert os.environ.get("NCCL_IB_GID_INDEX") is None
