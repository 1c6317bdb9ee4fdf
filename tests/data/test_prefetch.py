from __future__ import annotations

import gc
import threading

import pytest

from zaya_train.data.stream import prefetch


def running() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "prefetch"}


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_batches_come_in_order(depth: int) -> None:
    assert list(prefetch(lambda index: index * index, range(20), depth)) == [
        index * index for index in range(20)
    ]


def test_at_most_depth_batches_are_made_ahead() -> None:
    ahead, taken = list[int](), list[int]()
    changed = threading.Condition()

    def make(index: int) -> int:
        with changed:
            ahead.append(index + 1 - len(taken))
            changed.notify()
        return index

    with prefetch(make, range(100), 3) as batches:
        for number in range(97):
            # Counted before it is taken: a slot is free only afterwards.
            taken.append(number)
            assert next(batches) == number
            with changed:
                assert changed.wait_for(lambda: len(ahead) >= len(taken) + 3, 300)
    assert max(ahead) <= 3


@pytest.mark.parametrize("depth", [0, 5])
def test_error_is_raised_in_its_turn_and_ends_the_thread(depth: int) -> None:
    before = running()

    def make(index: int) -> int:
        if index == 2:
            raise ValueError("batch 2 is bad")
        return index

    batches = prefetch(make, range(10), depth)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="batch 2 is bad"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert running() <= before


def test_error_of_the_indices_reaches_the_consumer() -> None:
    def indices() -> object:
        yield 0
        raise RuntimeError("no more indices")

    batches = prefetch(lambda index: index, indices(), 2)  # type: ignore[arg-type]
    assert next(batches) == 0
    with pytest.raises(RuntimeError, match="no more indices"):
        next(batches)


def test_close_ends_a_thread_that_waits_for_a_slot() -> None:
    before = running()
    batches = prefetch(lambda index: index, iter(int, 1), 2)
    next(batches)
    (thread,) = running() - before
    batches.close()
    assert not thread.is_alive()
    with pytest.raises(StopIteration):
        next(batches)


def test_dropping_the_iterator_ends_the_thread() -> None:
    before = running()
    batches = prefetch(lambda index: index, iter(int, 1), 2)
    next(batches)
    (thread,) = running() - before
    del batches
    gc.collect()
    thread.join(300)
    assert not thread.is_alive()


def test_without_depth_nothing_is_made_ahead_and_no_thread_runs() -> None:
    before, made = running(), list[int]()
    with prefetch(lambda index: made.append(index), range(5), 0) as batches:
        assert running() <= before
        next(batches)
        assert made == [0]
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("depth", [0, 1])
def test_waiting_is_measured(depth: int) -> None:
    release = threading.Event()
    batches = prefetch(lambda index: release.wait(0.05), range(2), depth)
    assert batches.wait_seconds == 0.0
    next(batches)
    assert batches.wait_seconds > 0.0
    batches.close()
