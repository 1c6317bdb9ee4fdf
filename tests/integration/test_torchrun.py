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
from tests.helpers.shell import executable
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
            start_new_session=True,
            # Tests run in the background inherit an ignored SIGINT, which no shell can trap.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
    # The rank that says it comes late; torchrun would end it as soon as the other one leaves.
    late = f'[ "$RANK" = 1 ] || sleep 4\nexec {sys.executable} "$@"'
    with started(words, log, PYTHON=stand_in(tmp_path, late)) as bad:
        assert bad.wait(300) == 2, log.read_text()
    assert log.read_text().count("error: run.seed") == 1, log.read_text()
    report = tmp_path / "report.json"
    words = ["preflight", "--directory", str(tmp_path), "--output", str(report), "--device", "cpu"]
    with started(words, log, CLUSTER="mi300x_pollara") as fit:
        assert fit.wait(300) == 0, log.read_text()
    findings = json.loads(report.read_text())["findings"]
    same = {f["value"] for f in findings if f["check"] == "environment"}
    assert "NCCL_IB_GID_INDEX = 1" in same and "GPU_MAX_HW_QUEUES = 2" in same
    assert os.environ.get("NCCL_IB_GID_INDEX") is None


RANK = """
import os, signal, sys, time
from pathlib import Path

place = Path(os.environ["RANK"])

def told(number, frame):
    Path(f"told-{place}").touch()
    if "at once" not in sys.argv or number == signal.SIGINT:
        os._exit(75 if number == signal.SIGUSR1 else 130)

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, told)
signal.signal(signal.SIGINT, told)
Path(f"listening-{place}").touch()
while True:
    time.sleep(1)
"""


def stand_in(folder: Path, rank: str, launcher: str = "") -> str:
    """An interpreter that runs torchrun as it is, after `launcher`, and as a rank this line."""
    (folder / "rank.py").write_text(RANK)
    body = f'[ "$2" != torch.distributed.run ] || {{ {launcher}\n exec {sys.executable} "$@"; }}\n'
    return str(executable(folder / "python", body + rank))


def appear(folder: Path, process: subprocess.Popen[bytes], log: Path, *names: str) -> None:
    while not all((folder / name).exists() for name in names):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ranks", "result"),
    [((2, 75), 2), ((75, 137), 137), ((138, 75), 75), ((0, 0), 0)],
)
def test_the_code_that_says_most_is_returned(
    tmp_path: Path, ranks: tuple[int, int], result: int
) -> None:
    """A rank that fails makes torchrun end the others, whose codes are of no account."""
    rank = f'trap : TERM\n[ "$RANK" = 0 ] && exit {ranks[0]}\nexit {ranks[1]}'
    log = tmp_path / "log"
    with started([], log, PYTHON=stand_in(tmp_path, rank)) as process:
        assert process.wait() == result, log.read_text()


def test_a_signal_before_there_are_ranks_reaches_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    wait = ": >launched; until [ -e go ]; do sleep 0.02; done"
    python = stand_in(tmp_path, ": >began; exit 0", wait)
    with started([], log, PYTHON=python) as process:
        appear(tmp_path, process, log, "launched")
        process.send_signal(signal.SIGTERM)
        (tmp_path / "go").touch()
        assert process.wait() == 75, log.read_text()
    assert not (tmp_path / "began").exists()


@pytest.mark.parametrize(("words", "times", "result"), [("", 1, 75), ("'at once'", 2, 130)])
def test_ctrl_c_lets_the_ranks_save_and_twice_ends_them(
    tmp_path: Path, words: str, times: int, result: int
) -> None:
    """The terminal sends it to the whole group; torchrun itself would end the ranks by force."""
    log = tmp_path / "log"
    python = stand_in(tmp_path, f"exec {sys.executable} rank.py {words}")
    with started([], log, PYTHON=python) as process:
        appear(tmp_path, process, log, "listening-0", "listening-1")
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            appear(tmp_path, process, log, "told-0", "told-1")
        assert process.wait() == result, log.read_text()
    assert "SIGINT" not in log.read_text()
