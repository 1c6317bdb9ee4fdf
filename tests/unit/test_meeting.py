"""Ranks of one attempt find each other, and nobody who is not meant."""

from __future__ import annotations

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from torch._C._distributed_c10d import TCPStore

from zaya_train.config.errors import LostRankError
from zaya_train.runtime import meeting
from zaya_train.runtime.meeting import Place, meet

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_SECONDS = 300.0


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made


def place(rank: int, port: int, world: int = 2, seconds: float = PATIENCE_SECONDS) -> Place:
    return Place("127.0.0.1", port, rank, world, seconds)


def test_who_comes_again_waits_for_the_next_attempt(
    port: int, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    zero = threads.submit(meet, place(0, port))
    one = threads.submit(meet, place(1, port))
    one.result().set("word", "of the first")
    assert zero.result().get("word") == b"of the first"
    # Rank 1 has died and is back, rank 0 has not noticed yet.
    again = threads.submit(meet, place(1, port))
    while "waiting for it" not in caplog.text:
        assert not again.done()
        time.sleep(0.01)
    del zero, one
    next_zero = meet(place(0, port))
    again.result().set("word", "of the second")
    assert next_zero.get("word") == b"of the second"


def test_who_is_back_before_the_meeting_closes_takes_part(
    port: int, threads: ThreadPoolExecutor
) -> None:
    zero = threads.submit(meet, place(0, port, world=3))
    # Rank 1 came once, and died.
    came = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    assert came.add("meeting/joined/1", 1) == 1
    one = threads.submit(meet, place(1, port, world=3))
    while came.add("meeting/joined/1", 0) < 2:
        time.sleep(0.01)
    two = threads.submit(meet, place(2, port, world=3))
    one.result().set("word", "here")
    assert zero.result().get("word") == two.result().get("word") == b"here"


def test_a_rank_0_that_ends_before_all_have_come_costs_the_others_nothing(
    port: int, threads: ThreadPoolExecutor
) -> None:
    before = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    one = threads.submit(meet, place(1, port))
    before.wait(["meeting/joined/1"])
    del before
    zero = meet(place(0, port))
    one.result().set("word", "here")
    assert zero.get("word") == b"here"


def test_a_rank_0_that_ends_as_others_connect_costs_them_nothing(
    port: int, threads: ThreadPoolExecutor
) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener:
        one = threads.submit(meet, place(1, port))
        for _ in range(2):
            listener.accept()[0].close()
    zero = meet(place(0, port))
    one.result().set("word", "here")
    assert zero.get("word") == b"here"


def test_how_long_meeting_took_is_no_limit_for_what_follows(
    port: int, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_left", lambda deadline: timedelta(seconds=200))
    for made in [threads.submit(meet, place(rank, port)) for rank in (0, 1)]:
        limit: timedelta = made.result().timeout  # type: ignore[attr-defined]  # not in the stubs
        assert limit == timedelta(seconds=PATIENCE_SECONDS)


def test_a_meeting_that_never_closes_is_not_waited_for_beyond_the_limit(port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with pytest.raises(LostRankError, match="rank 1: not all of 3 ranks came within 2 s"):
        meet(place(1, port, world=3, seconds=2.0))
    assert store.add("meeting/joined/1", 0) == 1


def test_missing_ranks_are_named(port: int) -> None:
    rule = "of 12 ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more did not come within 1 s"
    with pytest.raises(LostRankError, match=rule):
        meet(place(0, port, world=12, seconds=1.0))


def test_a_place_where_nobody_answers_is_named(port: int) -> None:
    with pytest.raises(
        LostRankError, match=f"rank 0 at 127.0.0.1:{port}: nobody answers within 1 s"
    ):
        meet(place(1, port, seconds=1.0))


def test_an_attempt_that_does_not_end_is_waited_for_no_longer_than_allowed(
    port: int, threads: ThreadPoolExecutor
) -> None:
    kept = threads.submit(meet, place(0, port)), threads.submit(meet, place(1, port))
    assert all(store.result() for store in kept)
    with pytest.raises(LostRankError, match="no new attempt began within 2 s"):
        meet(place(1, port, seconds=2.0))
