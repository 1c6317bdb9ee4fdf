"""Processes that work through parts of an input; results come in the order of the parts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import TYPE_CHECKING, TypeVar

from zaya_train.config.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2
"""Parts given out per worker beyond the one whose result is awaited; bounds memory."""


class Workers:
    """`count` processes, or this one where `count` is 1; made by `workers`."""

    def __init__(self, count: int, pool: ProcessPoolExecutor | None) -> None:
        self.count = count
        self._pool = pool

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of every item, in their order; the first error in that order is raised.

        Raises:
            StorageError: a worker was ended from outside, as happens where memory runs out.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(function, item))
                if len(pending) > _AHEAD * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise StorageError(
                f"one of {self.count} worker processes was killed (out of memory?); fewer workers "
                "need less"
            ) from error
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """Start `count` processes, none for 1, and end them with the block."""
    if count == 1:
        yield Workers(1, None)
        return
    # Spawned: a fork copies the locks of the threads that tokenizers and a progress bar run.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _begin) as pool:
        yield Workers(count, pool)


def _begin() -> None:
    """Set up a worker: one thread, deaf to the terminal's Ctrl-C, gone when its parent is."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
