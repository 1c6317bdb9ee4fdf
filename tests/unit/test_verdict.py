"""Who hangs, who is slow, what exit codes mean and when it is a crash loop."""

from __future__ import annotations

import faulthandler
import itertools
import os
import threading
from typing import TYPE_CHECKING

import pytest

from zaya_train.config.faults import SupervisorConfig
from zaya_train.runtime.beats import UNKNOWN, Beat, beat_path, read_beat
from zaya_train.runtime.heartbeat import Heartbeat
from zaya_train.runtime.verdict import (
    Watched,
    backoff,
    culprits,
    exit_code_of,
    is_crash_loop,
    overdue,
    process_state,
    stragglers,
    to_blame,
    waits_for_ranks,
)

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = SupervisorConfig(hang_seconds=10, slow_seconds=100)


def beat(phase: str = "forward", marks: int = 40, steps_done: int = 5, **values: float) -> Beat:
    return Beat(
        pid=1,
        step=6,
        marks=marks,
        steps_done=steps_done,
        seconds=0.0,
        phase=phase,
        work_seconds=values.get("work", UNKNOWN),
        data_seconds=values.get("data", UNKNOWN),
        step_seconds=0.1,
    )


def watched(rank: int, word: Beat | None, silent: float = 11.0, state: str = "S") -> Watched:
    return Watched(rank, 100 + rank, word, silent, state)


def test_a_word_survives_the_file(tmp_path: Path) -> None:
    path = beat_path(tmp_path, 3)
    assert read_beat(path) is None
    heartbeat = Heartbeat(path, lambda: 0.25)
    heartbeat.mark("data", 1)
    heartbeat.step_done(2.0, 0.5)
    heartbeat.mark("forward", 2)
    heartbeat.mark("backward")
    word = read_beat(path)
    assert word is not None
    assert (word.pid, word.step, word.marks, word.steps_done) == (os.getpid(), 2, 3, 1)
    assert (word.phase, word.work_seconds, word.data_seconds) == ("backward", UNKNOWN, UNKNOWN)
    for waited in [0.5] * 60 + [9.0] * 5:
        heartbeat.step_done(2.0, waited)
    heartbeat.close()
    word = read_beat(path)
    assert word is not None
    # One long wait in a while is no slow rank.
    assert (word.work_seconds, word.data_seconds, word.step_seconds) == (0.25, 0.5, 2.0)
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert read_beat(path) is None
    path.write_bytes(data[:20])
    assert read_beat(path) is None


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    heartbeat = Heartbeat(None)
    heartbeat.mark("data", 1)
    heartbeat.step_done(1.0, 0.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "silent", "late"),
    [
        (beat(), 9.0, False),
        (beat(), 11.0, True),
        (beat("data"), 11.0, True),
        (beat("evaluate"), 11.0, True),
        (beat("save"), 11.0, False),
        (beat("load"), 11.0, False),
        (beat("save"), 101.0, True),
        (beat(steps_done=0), 11.0, False),
        (beat(steps_done=0), 101.0, True),
        (None, 11.0, False),
        (None, 101.0, True),
    ],
)
def test_how_long_a_rank_may_be_silent(word: Beat | None, silent: float, late: bool) -> None:
    assert bool(overdue([watched(0, word, silent)], CONFIG)) == late


WAITS = """Current thread 0x00007f (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 3156 in all_reduce
  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/x/zaya_train/parallel/collectives.py", line 21 in sum_over
"""
WORKS = """Thread 0x00007e (most recent call first):
  File "/x/torch/distributed/fsdp/_x.py", line 1 in wait

Current thread 0x00007f (most recent call first):
  File "/x/zaya_train/model/moe.py", line 12 in forward
  File "/x/torch/nn/modules/module.py", line 1 in _call_impl
  File "/x/torch/nn/modules/module.py", line 2 in _call_impl
  File "/x/torch/distributed/fsdp/_y.py", line 1 in forward
"""


def test_a_stopped_process_is_named_before_anything_else() -> None:
    ranks = [watched(0, beat(marks=3)), watched(1, beat(), state="T"), watched(2, beat())]
    assert culprits(ranks, {}) == [(1, "stopped by a signal")]
    assert culprits([watched(0, None), watched(1, None, state="Z")], {}) == [(1, "dead")]


def test_the_rank_that_is_behind_is_named() -> None:
    ranks = [watched(0, beat(marks=41)), watched(1, beat(marks=40)), watched(2, beat(marks=41))]
    assert culprits(ranks, {0: WAITS, 1: WAITS, 2: WAITS}) == [(1, "behind the others")]
    assert culprits([watched(0, beat()), watched(1, None)], {}) == [(1, "behind the others")]


def test_the_rank_that_waits_for_nobody_is_named() -> None:
    ranks = [watched(0, beat()), watched(1, beat()), watched(2, beat())]
    stacks = {0: WAITS, 1: WAITS, 2: WORKS}
    assert culprits(ranks, stacks) == [(2, "not waiting for other ranks")]
    # One that cannot even write its stacks does not wait either.
    assert culprits(ranks, {0: WAITS, 2: WAITS}) == [(1, "not waiting for other ranks")]
    assert culprits(ranks, dict.fromkeys(range(3), WAITS)) == [(r, "unknown") for r in range(3)]


def test_a_real_dump_of_the_main_thread_is_understood(tmp_path: Path) -> None:
    path, go = tmp_path / "stacks", threading.Event()
    other = threading.Thread(target=go.wait)
    other.start()
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    go.set()
    other.join()
    text = path.read_text()
    assert "Current thread" in text and "test_verdict.py" in text
    assert not waits_for_ranks(text)
    assert waits_for_ranks(text.replace("tests/unit/test_verdict.py", "torch/distributed/x.py"))


def test_a_slow_rank_is_named_and_noise_is_not() -> None:
    work = [0.010, 0.011, 0.031, 0.009]
    ranks = [watched(r, beat(work=seconds)) for r, seconds in enumerate(work)]
    assert [(rank, what) for rank, what, _, _ in stragglers(ranks, 2.0)] == [(2, "work_seconds")]
    assert stragglers(ranks, 4.0) == []
    waits = [watched(r, beat(work=0.01, data=s)) for r, s in enumerate([0.0, 0.0, 0.0, 0.5])]
    assert [(rank, what) for rank, what, _, _ in stragglers(waits, 2.0)] == [(3, "data_seconds")]
    tiny = [watched(r, beat(work=s)) for r, s in enumerate([1e-4, 1e-3])]
    assert stragglers(tiny, 2.0) == []
    hidden = [watched(r, beat(work=0.01, data=s)) for r, s in enumerate([0.0, 0.009])]
    assert stragglers(hidden, 2.0) == []
    assert stragglers([watched(0, beat(work=1.0)), watched(1, None)], 2.0) == []


@pytest.mark.parametrize(
    ("codes", "stopping", "meaning"),
    [
        ([0, 0], False, 0),
        ([0, 0], True, 0),
        ([75, 75], False, 75),
        ([75, 0], False, 75),
        ([2, 2], False, 2),
        ([3, 1], False, 3),
        ([1, 4], False, 4),
        ([5, 5], True, 5),
        ([1, 0], False, None),
        ([-9, 1], False, None),
        ([-9, 75], False, None),
        ([-9, 1], True, 75),
        ([130, 0], False, None),
    ],
)
def test_what_exit_codes_of_ranks_mean(
    codes: list[int], stopping: bool, meaning: int | None
) -> None:
    assert exit_code_of(codes, stopping) == meaning


@pytest.mark.parametrize(
    ("codes", "place"),
    [
        ([0, 75, None], None),
        ([1, -9, 1], 1),
        ([None, 1, 1], 1),
        ([0, None, -11], 2),
        ([5, 2], 1),
    ],
)
def test_a_signal_is_a_cause_and_other_codes_its_consequences(
    codes: list[int | None], place: int | None
) -> None:
    assert to_blame(codes, {}) == place


def test_of_equal_codes_the_one_with_a_word_explains() -> None:
    assert to_blame([1, 1, 1], {0: "", 2: "no luck"}) == 2


def test_failures_that_get_no_further_are_a_crash_loop() -> None:
    assert is_crash_loop([7, 7, 7], 3)
    assert is_crash_loop([3, 7, 6, 7], 3)
    assert not is_crash_loop([7, 7], 3)
    assert not is_crash_loop([7, 7, 8], 3)
    assert not is_crash_loop([5, 6, 7, 8], 3)
    assert is_crash_loop([0, 0], 2)


def test_the_wait_doubles_until_there_is_progress() -> None:
    config = SupervisorConfig(backoff_seconds=1.0, most_backoff_seconds=5.0)
    reached = [4, 4, 4, 4, 9, 9]
    waits = [backoff(reached[: n + 1], config) for n in range(len(reached))]
    assert waits == [1.0, 2.0, 4.0, 5.0, 1.0, 2.0]


def test_the_state_of_processes() -> None:
    assert process_state(os.getpid()) == "R"
    child = os.fork()
    if not child:
        os._exit(0)
    # Until somebody waits for it, it is a zombie.
    for _ in itertools.count():
        if process_state(child) == "Z":
            break
    os.waitpid(child, 0)
    assert process_state(child) == ""
