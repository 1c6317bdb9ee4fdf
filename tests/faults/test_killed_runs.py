"""Whatever is killed, whenever: the run resumes and ends bitwise as the unbroken one.

The long form kills in every way several times at moments drawn anew every night; the short one once
in each way. A failure names the seed, which repeats the steps and delays, though not the scheduler.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.helpers.tiny import RUN
from tests.integration.runs import Launched, last_step, overrides_for, values_for
from zaya_train.config.errors import EXIT_STORAGE
from zaya_train.run import CHECKPOINTS
from zaya_train.tools.compare import compare_runs
from zaya_train.train.metrics import METRICS_FILE, is_launch, iter_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

RANKS = 2
EVERY_STEPS: int = RUN["checkpoint"]["every_steps"]
LAST_STEP = 13
NIGHTLY_TRIALS = 7
"""Of each way: 21 runs, 42 kills."""
KILLS_PER_TRIAL = 2
LONGEST_DELAY_SECONDS = 0.3
"""About one step here, so that every part of a step, a save and an evaluation is met."""


def overrides(run_dir: Path, corpora: Path) -> list[str]:
    return overrides_for(values_for(run_dir, corpora))


def one_rank(words: Sequence[str], folder: Path, run_dir: Path, rng: random.Random) -> None:
    """The others notice by themselves and end."""
    launched = Launched(words, folder, ranks=RANKS)
    reach(launched, run_dir, rng)
    victim = rng.randrange(RANKS)
    launched.processes[victim].kill()
    codes = launched.wait()
    assert codes[victim] in (-signal.SIGKILL, 0)


def all_ranks_while_saving(
    words: Sequence[str], folder: Path, run_dir: Path, rng: random.Random
) -> None:
    launched = Launched(words, folder, ranks=RANKS)
    reach(launched, run_dir, rng, delay=False)
    partial = f"{CHECKPOINTS}/step-*.tmp"
    while any(p.is_alive() for p in launched.processes) and not any(run_dir.glob(partial)):
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.02)
    launched.kill()


def launcher(words: Sequence[str], folder: Path, run_dir: Path, rng: random.Random) -> None:
    """Half of the time the node goes with it; else its ranks live on as orphans, as torchrun's do,
    and a launch meanwhile waits for their lock or is refused."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_launch, args=(words, folder))
    process.start()
    assert process.pid is not None
    step = some_step(run_dir, rng)
    try:
        _wait_for(lambda: last_step(run_dir) >= step or not process.is_alive())
        time.sleep(rng.random() * LONGEST_DELAY_SECONDS)
        process.kill()
        process.join()
        if rng.random() < 0.5:
            return
        again = Launched(words, folder / "again", ranks=RANKS)
        ended_or_locked_out(again.wait(), again.output())
    finally:
        _kill_session(process.pid)


def ended_or_locked_out(codes: Sequence[int | None], output: str) -> None:
    """Asserts that a second launch ended well, or was refused for the first one's ranks alone."""
    refused = [EXIT_STORAGE] * RANKS
    assert list(codes) in ([0] * RANKS, refused), output
    assert list(codes) != refused or "another run writes checkpoints here" in output, output


def test_only_the_lock_excuses_a_refused_launch() -> None:
    ended_or_locked_out([0, 0], "")
    ended_or_locked_out([4, 4], "error: x: another run writes checkpoints here (process 7 on n)")
    for codes, output in (([4, 4], "No space left on device"), ([0, 4], "another run writes")):
        with pytest.raises(AssertionError):
            ended_or_locked_out(codes, output)


def _launch(words: Sequence[str], folder: Path) -> None:
    os.setsid()
    Launched(words, folder, ranks=RANKS).wait()


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def reach(launched: Launched, run_dir: Path, rng: random.Random, delay: bool = True) -> None:
    """Until a random step of what is left, and then a random part of one."""
    step = some_step(run_dir, rng)
    _wait_for(
        lambda: last_step(run_dir) >= step or not any(p.is_alive() for p in launched.processes)
    )
    if delay:
        time.sleep(rng.random() * LONGEST_DELAY_SECONDS)


def some_step(run_dir: Path, rng: random.Random) -> int:
    """Of those that are left."""
    return rng.randint(min(last_step(run_dir), LAST_STEP - 1), LAST_STEP - 1)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "the run stands still"
        time.sleep(0.005)


WAYS = (one_rank, all_ranks_while_saving, launcher)


def kill_and_resume(
    way: Callable[..., None], seed: int, kills: int, run_dir: Path, corpora: Path
) -> None:
    words, rng = overrides(run_dir, corpora), random.Random(seed)
    for number in range(kills):
        way(words, run_dir.with_name(f"killed-{number}"), run_dir, rng)
    last = Launched(words, run_dir.with_name("last"), ranks=RANKS)
    assert last.wait() == [0] * RANKS, last.output()


def lost_steps(run_dir: Path) -> list[int]:
    """Steps on record that each launch after the first did over again."""
    lost, newest = [], 0
    for row in iter_rows(run_dir / METRICS_FILE):
        if is_launch(row):
            lost.append(max(0, newest - row["step"]))
            newest = row["step"]
        elif row["kind"] == "step":
            newest = row["step"]
    return lost[1:]


def completed_and_lost(run_dir: Path) -> list[tuple[int, int]]:
    """Of each launch after the first: the newest checkpoint on record before it, and its step."""
    found, newest = [], 0
    for row in iter_rows(run_dir / METRICS_FILE):
        if is_launch(row):
            found.append((newest, row["step"]))
        elif row["kind"] == "checkpoint":
            newest = row["step"]
    return found[1:]


def check(run_dir: Path, unbroken: Path, seed: int) -> list[int]:
    """Asserts what the module promises; the steps lost at each kill."""
    comparison = compare_runs(run_dir, unbroken)
    assert comparison.equal, f"seed {seed}: {comparison.text()}"
    assert comparison.steps == LAST_STEP
    for completed, resumed in completed_and_lost(run_dir):
        assert resumed >= completed, f"seed {seed}: step {completed} was saved, {resumed} resumed"
    lost = lost_steps(run_dir)
    # The interval, and the steps done while the save of its end was being written: at most another
    # interval, at whose end training waits for that save; a kill may come while it waits.
    assert all(steps <= 2 * EVERY_STEPS for steps in lost), f"seed {seed}: {lost}"
    return lost


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_killed_once_and_resumed(
    unbroken: Path, corpora: Path, tmp_path: Path, way: Callable[..., None]
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    kill_and_resume(way, seed, 1, tmp_path / "run", corpora)
    check(tmp_path / "run", unbroken, seed)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_killed_again_and_again(
    unbroken: Path,
    corpora: Path,
    tmp_path: Path,
    way: Callable[..., None],
    record_property: Callable[[str, object], None],
) -> None:
    lost: list[int] = []
    for trial in range(NIGHTLY_TRIALS):
        seed = random.SystemRandom().randrange(10**6)
        run_dir = tmp_path / str(trial) / "run"
        run_dir.parent.mkdir()
        kill_and_resume(way, seed, KILLS_PER_TRIAL, run_dir, corpora)
        lost += check(run_dir, unbroken, seed)
    record_property("lost_steps", lost)
    print(f"{way.__name__}: {NIGHTLY_TRIALS} trials, lost steps {lost}")
