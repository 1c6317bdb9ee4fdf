"""wandb and TensorBoard killed, blocked or absent: training ends as ever."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.replays import expected, hang_wandb, in_tensorboard, in_wandb, same
from tests.helpers.tiny import PHASE
from tests.integration.runs import (
    PATIENCE_SECONDS,
    Launched,
    make_corpora,
    overrides_for,
    values_for,
    zaya,
)
from zaya_train.runtime import replays
from zaya_train.runtime.heartbeat import Heartbeat
from zaya_train.tools.compare import compare_runs
from zaya_train.tools.replay_sinks import EVENT_FILES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

EVENTS = f"tensorboard/{EVENT_FILES}"
SHORT = {
    "plan.phases": {"short": {**PHASE, "tokens": 4 * 256}},
    "parallel.context_parallel_limit": 1,
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpus"))


def launch(folder: Path, corpora: Path, ranks: int = 1, **logging: Any) -> Launched:
    """A run with these followers."""
    chosen = {f"logging.{key}": value for key, value in logging.items()}
    values = values_for(folder / "run", corpora, {**SHORT, **chosen})
    return Launched(overrides_for(values), folder, ranks)


def train(folder: Path, corpora: Path, **logging: Any) -> Path:
    """The same, ended as planned."""
    launched = launch(folder, corpora, **logging)
    assert launched.wait() == [0], launched.output()
    return folder / "run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """The same run with nothing that follows it."""
    return train(tmp_path_factory.mktemp("alone"), corpora)


def followers(run_dir: Path) -> list[int]:
    """Processes that replay this run, each the first of its session."""
    told = str(run_dir.resolve()).encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"sync" in words and told in words:
            found.append(int(place.name))
    return found


def end(run_dir: Path) -> int:
    """SIGKILL for all of them; how many there were."""
    found = followers(run_dir)
    for process in found:
        os.kill(process, signal.SIGKILL)
    return len(found)


@contextmanager
def killing_followers(run_dir: Path, step: int) -> Iterator[None]:
    """Runs launched meanwhile: what follows them is killed in the forward pass of `step`, once
    it has begun to write."""
    mark = Heartbeat.mark
    told = run_dir / "killed"

    def marked(heartbeat: Heartbeat, phase: str, now: int | None = None) -> None:
        mark(heartbeat, phase, now)
        if (phase, now) == ("forward", step) and not told.exists():
            while not (any(run_dir.glob("wandb/*/*.wandb")) and any(run_dir.glob(EVENTS))):
                time.sleep(0.01)
            told.write_text(str(end(run_dir)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heartbeat, "mark", marked)
        yield


def test_killed_in_the_middle_of_training(alone: Path, corpora: Path, tmp_path: Path) -> None:
    with killing_followers(tmp_path / "run", 3):
        run = train(tmp_path, corpora, wandb="offline", tensorboard=True)
    assert (run / "killed").read_text() == "2"
    comparison = compare_runs(run, alone)
    assert comparison.equal, comparison.text()
    log = (run / "logs" / "rank-0.log").read_text()
    for name in ("wandb", "tensorboard"):
        assert f"the replay in {name} ended with -9" in log
    assert zaya(["sync", str(run)], tmp_path / "sync") == 0, (tmp_path / "sync").read_text()
    assert same(in_wandb(run), expected(run))
    assert same(in_tensorboard(run), expected(run), single=True)


def test_a_server_that_accepts_and_never_answers(
    alone: Path, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its replay still waits when the run ends, or has given up, depends on the machine."""
    monkeypatch.setattr(replays, "LEAVE_SECONDS", 0.5)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        try:
            run = train(tmp_path, corpora, wandb="online")
        finally:
            end(tmp_path / "run")
    comparison = compare_runs(run, alone)
    assert comparison.equal, comparison.text()
    log = (run / "logs" / "rank-0.log").read_text()
    assert re.search(r"the replay in wandb (has not finished|ended with 1) ", log)
    words = ["sync", str(run), "--only", "wandb"]
    assert zaya(words, tmp_path / "sync") == 0, (tmp_path / "sync").read_text()
    assert same(in_wandb(run), expected(run))


def test_a_package_that_is_absent_and_a_folder_that_cannot_be_written(
    alone: Path, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two followers one finds no package, the other no place; a run without them is as
    good, and both can be had later."""
    absent = tmp_path / "absent" / "wandb"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ModuleNotFoundError('No module named wandb')\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file where the folder should be")
    with monkeypatch.context() as patch:
        patch.setattr(replays, "LEAVE_SECONDS", PATIENCE_SECONDS)
        patch.setenv("PYTHONPATH", str(absent.parent))
        run = train(tmp_path, corpora, wandb="offline", tensorboard=True)
    comparison = compare_runs(run, alone)
    assert comparison.equal, comparison.text()
    assert "No module named wandb" in replays.log_of(run, "wandb").read_text()
    log = (run / "logs" / "rank-0.log").read_text()
    assert log.count("complete it with: zaya sync") == 2
    (run / "tensorboard").unlink()
    words = ["sync", str(run), "--only", "tensorboard"]
    assert zaya(words, tmp_path / "sync") == 0, (tmp_path / "sync").read_text()
    assert same(in_tensorboard(run), expected(run), single=True)


def test_a_failing_rank_waits_for_no_replay(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 dies in step 3 of two; rank 0, whose replay never ends, says so and ends."""
    mark = Heartbeat.mark

    def marked(heartbeat: Heartbeat, phase: str, now: int | None = None) -> None:
        mark(heartbeat, phase, now)
        if (phase, now, os.environ["RANK"]) == ("forward", 3, "1"):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Heartbeat, "mark", marked)
    monkeypatch.setattr(replays, "LEAVE_SECONDS", PATIENCE_SECONDS)
    hang_wandb(tmp_path / "packages", monkeypatch)
    launched = launch(tmp_path, corpora, ranks=2, wandb="offline")
    try:
        assert launched.wait() == [1, -signal.SIGKILL], launched.output()
        assert len(followers(tmp_path / "run")) == 1, "rank 0 has waited until it gave up"
    finally:
        end(tmp_path / "run")
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "rank 0: LostRankError: no word from rank 1" in log
    assert "the replay in wandb" not in log


def test_a_refused_resume_leaves_what_replays_have_shown(corpora: Path, tmp_path: Path) -> None:
    """A learning rate that its checkpoint was not made with."""
    run = train(tmp_path, corpora, tensorboard=True)
    log = replays.log_of(run, "tensorboard")
    log.write_text("the first attempt's\n")
    (events,) = run.glob(EVENTS)
    values = values_for(run, corpora, {**SHORT, "logging.tensorboard": True})
    again = Launched([*overrides_for(values), "optim.muon.learning_rate=0.5"], tmp_path / "again")
    assert again.wait() == [2], again.output()
    while followers(run):
        time.sleep(0.1)
    assert list(run.glob(EVENTS)) == [events]
    assert log.read_text() == "the first attempt's\n"
