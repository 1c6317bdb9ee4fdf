"""Hung, killed and crashing ranks under a supervisor: named, restarted, and the same weights."""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.supervised import CHANGES, Supervised
from tests.integration.runs import Launched, left_alone, overrides_for, values_for
from zaya_train.config.errors import StorageError
from zaya_train.config.faults import SupervisorConfig
from zaya_train.runtime.local_ranks import Launch
from zaya_train.runtime.supervisor import Supervisor
from zaya_train.runtime.verdict import Watched, overdue
from zaya_train.tools.compare import compare_runs

if TYPE_CHECKING:
    from pathlib import Path

GRACE_SECONDS = 500.0
"""For ranks that all end by themselves, however loaded the machine is."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of supervisors in this process."""
    monkeypatch.setattr("zaya_train.runtime.supervisor._GRACE_SECONDS", GRACE_SECONDS)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """The supervised run, left alone."""
    return left_alone(tmp_path_factory.mktemp("unbroken"), corpora, CHANGES, ranks=2)


def test_a_stopped_rank_is_named_a_killed_one_replaced_and_a_stop_signal_passed_on(
    corpora: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = overrides_for(values_for(run_dir, corpora, CHANGES))
    with Supervised(words, run_dir, tmp_path / "log", "--ranks", "2") as run:
        run.signal_rank(1, 1, signal.SIGSTOP)
        run.signal_rank(0, 2, signal.SIGKILL)
        run.pid_of(1, 3)
        run.process.send_signal(signal.SIGUSR1)
        assert run.wait() == 75, run.output()
        status, incidents = run.status(), run.incidents()
    assert (status["state"], status["exit_code"], status["requeue"]) == ("requeue", 75, True)
    assert [failure["attempt"] for failure in status["failures"]] == [1, 2]
    assert [record["kind"] for record in incidents] == ["hang", "crash", "crash"]
    hang = incidents[0]
    assert hang["named"] == [1]
    assert "rank 1 hangs in " in hang["reason"] and "stopped by a signal" in hang["reason"]
    assert "limit 15 s" in hang["reason"]
    assert "rank 0: killed by SIGKILL" in status["failures"][1]["reason"]
    # The rank that waited left its stacks; the stopped one could not.
    stacks = (run_dir / "logs" / "attempt-0001" / "rank-0.stacks").read_text()
    assert "Current thread" in stacks and "zaya_train" in stacks
    last = Launched(words, tmp_path / "last", ranks=2)
    assert last.wait() == [0, 0], last.output()
    comparison = compare_runs(run_dir, unbroken)
    assert comparison.equal, comparison.text()


@pytest.mark.nightly
def test_ranks_whose_supervisor_dies_save_and_end(
    corpora: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = overrides_for(values_for(run_dir, corpora, CHANGES))
    with Supervised(words, run_dir, tmp_path / "log", "--ranks", "2") as run:
        pids = [run.pid_of(rank, 1) for rank in (0, 1)]
    while any(map(_alive, pids)):
        time.sleep(0.01)
    assert "stop signal 15: saving at step" in (run_dir / "logs" / "rank-0.log").read_text()
    last = Launched(words, tmp_path / "last", ranks=2)
    assert last.wait() == [0, 0], last.output()
    comparison = compare_runs(run_dir, unbroken)
    assert comparison.equal, comparison.text()


def supervise(folder: Path, body: str, ranks: int = 1, **settings: float) -> tuple[int, Any]:
    """A supervisor over ranks that run `body`, with the status it leaves."""
    supervisor = supervisor_of(folder, body, ranks, **settings)
    return supervisor.run(), supervisor


def supervisor_of(folder: Path, body: str, ranks: int = 1, **settings: float) -> Supervisor:
    values: dict[str, Any] = {"backoff_seconds": 0.01, "status_seconds": 0.01, **settings}
    script = folder / "rank.py"
    script.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{body}\n")
    launch = Launch((sys.executable, str(script)), folder / "run", ranks)
    return Supervisor(launch, SupervisorConfig(**values))


FAILS_IN_STEP_THREE = """
from zaya_train.main import main
from zaya_train.runtime.heartbeat import Heartbeat
done = Heartbeat.step_done
def failing(heartbeat, *seconds):
    done(heartbeat, *seconds)
    if heartbeat._steps_done == 3: raise RuntimeError('no luck')
Heartbeat.step_done = failing
sys.exit(main(['train', *{words!r}]))
"""


def test_a_rank_that_raises_has_failed_in_the_step_under_way(corpora: Path, tmp_path: Path) -> None:
    # On its way out it says that it waits for a save.
    run_dir = tmp_path / "run"
    words = overrides_for(values_for(run_dir, corpora, CHANGES))
    body = FAILS_IN_STEP_THREE.format(words=words)
    code, supervisor = supervise(tmp_path, body, same_step_failures=1)
    assert code == 6
    assert [failure.step for failure in supervisor._failures] == [3]
    (crash,) = map(json.loads, (run_dir / "incidents.jsonl").read_text().splitlines())
    assert crash["step"] == 3


def test_the_step_of_a_failure_is_the_furthest_of_the_attempt(tmp_path: Path) -> None:
    # A roll back: the rank is seen in step 5, and again in step 2 when it fails.
    status = tmp_path / "run" / "status.json"
    body = f"""
from pathlib import Path
from zaya_train.runtime.beats import DIRECTORY, Beat
def mark(step):
    word = Beat(os.getpid(), step, 1, 1, time.monotonic(), 'data', -1.0, -1.0, 0.0)
    Path(os.environ[DIRECTORY], 'rank-0').write_bytes(word.packed())
mark(5)
while '"step": 5' not in Path({str(status)!r}).read_text(): time.sleep(0.01)
mark(2)
sys.exit(1)
"""
    _, supervisor = supervise(tmp_path, body, same_step_failures=1)
    assert [failure.step for failure in supervisor._failures] == [5]


def test_the_same_failure_again_and_again_is_a_crash_loop(tmp_path: Path) -> None:
    code, _ = supervise(tmp_path, "print('no such device'); sys.exit(1)", same_step_failures=3)
    assert code == 6
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert logs == ["attempt-0001", "attempt-0002", "attempt-0003"]


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 75])
def test_an_exit_code_that_says_something_is_passed_on_at_once(code: int, tmp_path: Path) -> None:
    assert supervise(tmp_path, f"sys.exit({code})")[0] == code
    assert len(list((tmp_path / "run" / "logs").iterdir())) == 1


def test_the_reason_is_the_signal_and_not_what_it_led_to(tmp_path: Path) -> None:
    # Both end badly before the supervisor's grace is over, in either order.
    body = "if rank: os.kill(os.getpid(), 9)\nsys.exit(1)"
    code, supervisor = supervise(tmp_path, body, ranks=2, same_step_failures=1)
    assert code == 6
    [failure] = supervisor._failures
    assert failure.reason.startswith("rank 1: killed by SIGKILL")


def test_the_last_line_of_the_failing_rank_is_shown(tmp_path: Path) -> None:
    body = "if rank: print('rank 1: ValueError: no luck', flush=True)\nsys.exit(rank)"
    _, supervisor = supervise(tmp_path, body, ranks=2, same_step_failures=1)
    [failure] = supervisor._failures
    assert failure.reason == "rank 1: exit code 1: rank 1: ValueError: no luck"


def test_a_rank_without_a_word_is_overdue_and_what_it_started_dies_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, named = tmp_path / "child", tmp_path / "child.part"
    body = (
        "pid = os.fork()\n"
        f"if pid: open({str(named)!r}, 'w').write(str(pid))\n"
        f"if pid: os.rename({str(named)!r}, {str(child)!r})\n"
        "while True: time.sleep(1)"
    )

    def once_it_has_a_child(ranks: list[Watched], config: SupervisorConfig) -> list[Watched]:
        # However long the interpreter takes to start.
        return overdue(ranks, config) if child.exists() else []

    monkeypatch.setattr("zaya_train.runtime.supervisor.overdue", once_it_has_a_child)
    code, supervisor = supervise(tmp_path, body, same_step_failures=1, slow_seconds=0.5)
    assert code == 6
    [failure] = supervisor._failures
    assert "rank 0 hangs before its first word" in failure.reason
    assert "limit 0.5 s" in failure.reason
    while _alive(int(child.read_text())):
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_of_equal_failures_the_one_that_left_a_word_is_told(tmp_path: Path) -> None:
    body = "if rank: print('rank 1: no luck', flush=True)\nsys.exit(1)"
    _, supervisor = supervise(tmp_path, body, ranks=2, same_step_failures=1)
    [failure] = supervisor._failures
    assert failure.reason == "rank 1: exit code 1: rank 1: no luck"


def test_a_refused_note_ends_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, _: Any) -> None:
        raise StorageError(f"{path}: not written: No space left on device")

    monkeypatch.setattr("zaya_train.runtime.supervisor.write_json", refuse)
    (tmp_path / "run" / "incidents.jsonl").mkdir(parents=True)  # refuses every line
    done = tmp_path / "done"
    code, _ = supervise(tmp_path, f"open({str(done)!r}, 'w').close()")
    assert code == 0 and done.exists()
    assert "status.json: not written: No space left on device; training goes on" in caplog.text
    assert supervise(tmp_path, "sys.exit(1)", same_step_failures=2)[0] == 6
    assert "incidents.jsonl: lines wait: Is a directory" in caplog.text


def test_a_line_that_a_full_disk_tore_is_finished_and_not_glued_to_the_next(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run" / "incidents.jsonl"
    path.parent.mkdir()
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, whole[1]))
    try:
        records = supervisor_of(tmp_path, "")
        records._incident("crash", reason="x" * 200)
        assert path.stat().st_size == 100
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    records._incident("crash", reason="y")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["reason"][0] for line in lines] == ["x", "y"]


def test_who_asks_twice_does_not_wait_and_nobody_is_called_late(tmp_path: Path) -> None:
    # The rank passes the first Ctrl-C back, so the supervisor has heard it when the second comes.
    body = (
        "signal.signal(signal.SIGINT, lambda *_: os.kill(os.getppid(), signal.SIGINT))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "while True: time.sleep(1)"
    )
    assert supervise(tmp_path, body)[0] == 75
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("requeue", "asked twice to stop")
    assert not (tmp_path / "run" / "incidents.jsonl").exists()


def test_nodes_that_share_a_run_directory_keep_apart(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("import sys\nsys.exit(0)\n")
    for node in (0, 1, 1):
        launch = Launch(
            (sys.executable, str(script)), tmp_path / "run", 1, 2, node, ("127.0.0.1", 29999)
        )
        assert Supervisor(launch, SupervisorConfig(status_seconds=0.01)).run() == 0
    names = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert names == ["attempt-0001", "attempt-0001-node1", "attempt-0002-node1"]
    assert (tmp_path / "run" / "status-node1.json").exists()


def test_attempts_are_counted_over_supervisors(tmp_path: Path) -> None:
    for _ in range(2):
        supervise(tmp_path, "sys.exit(0)")
    names = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert names == ["attempt-0001", "attempt-0002"]
