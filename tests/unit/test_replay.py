"""`zaya sync`: every row in TensorBoard and wandb, once, whatever happened before."""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.distributed import PATIENCE_SECONDS
from tests.helpers.replays import expected, hang_wandb, in_tensorboard, in_wandb, same
from tests.helpers.tiny import tiny
from tests.unit.test_metrics import LAUNCH, step_values, write_run
from zaya_train.config.build import to_dict
from zaya_train.config.schema import LoggingConfig
from zaya_train.main import main
from zaya_train.runtime import replays
from zaya_train.runtime.replays import Replays, log_of
from zaya_train.tools import replay as replay_module
from zaya_train.tools.replay import _alone, replay
from zaya_train.tools.replay_sinks import SINKS, WANDB_ID_FILE, curves, shown
from zaya_train.train.attempts import record_attempt
from zaya_train.train.metrics import METRICS_FILE, ROW_FIELDS, MetricsWriter, current_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def write_rolled_back_run(run_dir: Path) -> Path:
    """A run that was rolled back twice, with numbers that JSON does not have."""
    record_attempt(run_dir, 1, to_dict(tiny()))
    for first, last in ((0, 5), (3, 6), (2, 4)):
        with MetricsWriter(run_dir, enabled=True) as metrics:
            metrics.write("resume" if first else "start", step=first, **LAUNCH)
            for step in range(first + 1, last + 1):
                loss = math.nan if step == 4 else step + 0.1 * first
                metrics.write("step", **step_values(step, loss=loss, tokens=10**13 + step))
            metrics.write("eval", step=last, phase="core", losses={"text": math.inf})
            metrics.write("checkpoint", step=last, path="c", seconds=0.1, bytes=10**11)
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_rolled_back_run(tmp_path)


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The same after two replays, the second over what the first and a torn one left; the id at
    wandb after each."""
    run_dir = write_rolled_back_run(tmp_path_factory.mktemp("synced"))
    (run_dir / "tensorboard").mkdir()
    (run_dir / "tensorboard" / "events.out.tfevents.1.dead.1").write_bytes(b"torn")
    kept = {k: v for k, v in os.environ.items() if "WANDB" not in k}
    command = [sys.executable, "-m", "zaya_train", "sync", str(run_dir)]
    ids = []
    for _ in range(2):
        done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"wandb: {len(expected(run_dir))} rows" in done.stdout
        ids.append((run_dir / WANDB_ID_FILE).read_text().strip())
    return run_dir, ids


def test_a_replay_is_complete_and_repeating_it_shows_nothing_twice(
    synced: tuple[Path, list[str]],
) -> None:
    run_dir, ids = synced
    rows = expected(run_dir)
    assert sum("superseded/train/loss" in values for _, values in rows) == 6
    assert same(in_wandb(run_dir), rows)
    assert same(in_tensorboard(run_dir), rows, single=True)
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert ids[0] == ids[1] and folder.name.endswith(ids[0])


def test_what_counts_is_shown_as_the_readers_of_metrics_see_it(
    synced: tuple[Path, list[str]],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(synced[0] / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert "events/start" in events.Tags()["tensors"]


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, bool]] = []
        self.closed = 0

    def write(self, row: dict[str, Any], superseded: bool) -> None:
        self.rows.append((row["kind"], row["step"], superseded))

    def close(self) -> None:
        self.closed += 1


def scripted(*events: Callable[[], None]) -> Callable[[float], bool]:
    """A run that does something between two looks, and has ended after the last."""
    left: Iterator[Callable[[], None]] = iter(events)

    def ended(_: float) -> bool:
        event = next(left, None)
        if event is not None:
            event()
        return event is None

    return ended


def test_a_run_that_is_followed_is_shown_from_before_its_first_row_to_its_last(
    tmp_path: Path,
) -> None:
    sinks: list[Kept] = []

    def make() -> Kept:
        sinks.append(Kept())
        return sinks[-1]

    def torn() -> None:
        with (tmp_path / METRICS_FILE).open("ab") as file:
            file.write(b'{"kind":"st')

    ended = scripted(
        lambda: None,
        lambda: write_run(tmp_path, "start", 0, 2),
        torn,
        # Goes on where it was: nothing shown is taken back.
        lambda: write_run(tmp_path, "resume", 2, 3),
        # Takes step 2 and 3 back.
        lambda: write_run(tmp_path, "resume", 1, 2),
    )
    rows = replay(tmp_path / METRICS_FILE, make, ended)
    first, second = sinks
    assert first.rows == [
        ("start", 0, False),
        ("step", 1, False),
        ("step", 2, False),
        ("resume", 2, False),
        ("step", 3, False),
    ]
    assert second.rows == [
        ("start", 0, False),
        ("step", 1, False),
        ("step", 2, True),
        ("resume", 2, False),
        ("step", 3, True),
        ("resume", 1, False),
        ("step", 2, False),
    ]
    assert [sink.closed for sink in sinks] == [1, 1]
    assert rows == len(second.rows)


def test_marks_are_what_readers_drop(run_dir: Path) -> None:
    sink = Kept()
    replay(run_dir / METRICS_FILE, lambda: sink)
    from zaya_train.train.metrics import iter_rows

    rows = [(r["kind"], r["step"]) for r in current_rows(iter_rows(run_dir / METRICS_FILE))]
    assert [(kind, step) for kind, step, superseded in sink.rows if not superseded] == rows


def test_a_run_without_metrics_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sync", str(tmp_path)]) == 2
    assert "metrics.jsonl: no such file; nothing to replay" in capsys.readouterr().err


def test_curves_are_the_numbers_of_step_and_eval_rows() -> None:
    values = curves({"kind": "step", "attempt": 1, "wall_time": 0.0, **step_values(7)})
    assert values["train/tokens"] == 448.0 and values["train/applied"] == 1.0
    assert not {"train/step", "train/load", "train/phase", "train/attempt"} & values.keys()
    assert curves({"kind": "eval", "losses": {"a": 2.0}}) == {"validation/a": 2.0}
    assert curves({"kind": "done", "step": 3}) == {}
    assert set(ROW_FIELDS["step"]) >= {key.removeprefix("train/") for key in values}
    assert shown({"kind": "eval", "losses": {"a": 2.0}}, True) == {"superseded/validation/a": 2.0}


def test_a_sink_that_a_run_feeds_holds_up_no_other(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replay_module, "WAIT_SECONDS", 0.0)
    for name in SINKS:
        monkeypatch.setitem(SINKS, name, lambda *_: Kept())
    with _alone(run_dir, "tensorboard", 0.0):
        assert main(["sync", str(run_dir)]) == 4
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"wandb: {len(expected(run_dir))} rows"
    assert said.err.endswith("a run, or another zaya sync, feeds tensorboard just now\n")


def test_a_replay_waits_for_one_that_is_about_to_end(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = replay_module._locked
    monkeypatch.setattr(replay_module, "POLL_SECONDS", 0.0)
    monkeypatch.setitem(SINKS, "wandb", lambda *_: Kept())
    with ExitStack() as other:
        other.enter_context(_alone(run_dir, "wandb", 0.0))

        got: list[bool] = []

        def asked(descriptor: int) -> bool:
            got.append(locked(descriptor))
            if len(got) == 2:
                other.close()
            return got[-1]

        monkeypatch.setattr(replay_module, "_locked", asked)
        assert main(["sync", str(run_dir), "--only", "wandb"]) == 0
    assert got == [False, False, True]


FOLLOW = """
import sys
from zaya_train.main import main
from zaya_train.tools import replay
replay.END_SECONDS = 0.1
sys.exit(main(["sync", *sys.argv[1:], "--follow"]))
"""


def test_a_sink_that_never_returns_ends_with_the_run_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a script, whose session is not its own, and whose other processes must live on."""
    hang_wandb(tmp_path / "packages", monkeypatch)
    write_run(tmp_path, "start", 0, 2)
    look = "cat /proc/self/autogroup || echo without"
    change = "echo 7 2>/dev/null >/proc/self/autogroup"
    shell = f'{change}; {look}; "$@" </dev/null; echo "ended with $?"; {look}'
    words = ["sh", "-c", shell, "sh", sys.executable, "-c", FOLLOW]
    done = subprocess.run(
        [*words, str(tmp_path), "--only", "wandb"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
        start_new_session=True,
    )
    before, ended, after = done.stdout.splitlines()
    assert ended == "ended with 1", done.stderr
    assert before == after
    assert "not finished 0.1 s after the run's end: given up" in done.stderr
    with _alone(tmp_path, "wandb", 0.0):
        assert not (tmp_path / WANDB_ID_FILE).exists(), "wandb was to hang"


def test_what_follows_a_run_gives_way_to_it_and_no_failing_run_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the run is over it has its share of the processor, where kernels have autogroups."""
    hang_wandb(tmp_path / "packages", monkeypatch)
    write_run(tmp_path, "start", 0, 2)
    started = Replays(LoggingConfig(tensorboard=False, wandb="offline"), tmp_path, enabled=True)
    with pytest.raises(ZeroDivisionError), started:
        started.start()
        process = started._processes["wandb"]
        while not (tmp_path / "logs" / "replay-wandb.lock").exists():
            assert process.poll() is None, log_of(tmp_path, "wandb").read_text()
            time.sleep(0.01)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        assert nice_of_session(process.pid) in (19, None)
        raise ZeroDivisionError
    assert process.poll() is None, "it was waited for: it ends by itself after END_SECONDS"
    while nice_of_session(process.pid) not in (0, None):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()


def nice_of_session(process: int) -> int | None:
    """That of the scheduler's group for its session; None where the kernel has no such groups."""
    path = Path(f"/proc/{process}/autogroup")
    return int(path.read_text().split()[-1]) if path.exists() else None


OFF: dict[str, Any] = {"tensorboard": False, "wandb": "disabled"}


def follow(chosen: dict[str, Any], run_dir: Path, enabled: bool = True) -> None:
    """A run that is over as soon as it has begun."""
    with Replays(LoggingConfig(**chosen), run_dir, enabled) as started:
        started.start()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, a run here waits until its replays have ended."""
    monkeypatch.setattr(replays, "LEAVE_SECONDS", PATIENCE_SECONDS)


@pytest.mark.parametrize(
    ("chosen", "broken", "reason"),
    [
        ({"wandb": "online"}, "no key", "no api key configured"),
        ({"tensorboard": True}, "tensorboard", "tensorboard"),
        ({"tensorboard": True}, "logs", ""),
    ],
)
def test_what_is_misconfigured_is_told_and_stops_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    chosen: dict[str, Any],
    broken: str,
    reason: str,
) -> None:
    """Everything that training calls, without training around it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    record_attempt(tmp_path, 1, to_dict(tiny()))
    write_run(tmp_path, "start", 0, 2)
    (name,) = chosen
    if broken != "logs":
        log_of(tmp_path, name).parent.mkdir()
        log_of(tmp_path, name).write_text("an earlier attempt's\n")
    if broken != "no key":
        (tmp_path / broken).write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING):
        follow({**OFF, **chosen}, tmp_path)
    (message,) = [record.getMessage() for record in caplog.records]
    if broken == "logs":
        assert message.startswith("tensorboard not started, training goes on without it: ")
        return
    assert message.startswith(f"the replay in {name} ended with ")
    assert message.endswith(f"zaya sync {tmp_path}")
    told = log_of(tmp_path, name).read_text().lower()
    assert told.startswith("an earlier attempt's\n") and reason in told


def test_nothing_is_started_unless_chosen(tmp_path: Path) -> None:
    follow(OFF, tmp_path)
    follow({"tensorboard": True, "wandb": "offline"}, tmp_path, enabled=False)
    assert list(tmp_path.iterdir()) == []


def connections(server: socket.socket) -> int:
    """Connections waiting at a listening socket."""
    server.setblocking(False)
    count = 0
    try:
        while True:
            server.accept()[0].close()
            count += 1
    except BlockingIOError:
        return count


def test_offline_wandb_opens_no_connection(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"):
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        follow({"tensorboard": False, "wandb": "offline"}, run_dir)
        assert connections(server) == 0
    assert caplog.messages == []
    assert same(in_wandb(run_dir), expected(run_dir))
