"""Batches made ahead of the step by one background thread."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _Finished:
    """Marks the end of the indices."""


class Prefetcher(Generic[T]):
    """Iterator over `make_batch(index)`; use as a context manager or call `close`.

    With a depth of 0 there is no thread and the consumer waits for every batch. The thread ends
    when the indices do, when `make_batch` raises (the error is raised again here, in its turn),
    when `close` is called, and when the iterator is dropped.
    """

    def __init__(self, make_batch: Callable[[int], T], indices: Iterable[int], depth: int) -> None:
        self.wait_seconds = 0.0
        """Time the consumer has spent waiting for batches so far."""
        self._batches: queue.Queue[T | _Failure | _Finished] = queue.Queue()
        self._slots = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._over = False
        self._thread: threading.Thread | None = None
        self._inline: Iterator[T] = map(make_batch, indices)
        if not depth:
            return
        self._thread = threading.Thread(
            target=_produce,
            args=(make_batch, indices, self._batches, self._slots, self._stop),
            name="prefetch",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _end, self._stop, self._slots)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        start = time.perf_counter()
        try:
            batch = self._batches.get() if self._thread else next(self._inline)
        except BaseException:
            self._over = True
            raise
        finally:
            self.wait_seconds += time.perf_counter() - start
        if isinstance(batch, _Failure):
            self.close()
            raise batch.error
        if isinstance(batch, _Finished):
            self.close()
            raise StopIteration
        self._slots.release()
        return batch

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for the batch it is making."""
        self._over = True
        if self._thread is not None:
            self._finalizer()
            self._thread.join()


def prefetch(make_batch: Callable[[int], T], indices: Iterable[int], depth: int) -> Prefetcher[T]:
    """Iterate over `make_batch(index)` with up to `depth` batches made ahead; 0: in this thread."""
    return Prefetcher(make_batch, indices, depth)


def _produce(
    make_batch: Callable[[int], T],
    indices: Iterable[int],
    batches: queue.Queue[T | _Failure | _Finished],
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """Thread body; holds no reference to the iterator, so that dropping it ends the thread."""
    try:
        for index in indices:
            slots.acquire()
            if stop.is_set():
                return
            batches.put(make_batch(index))
    except BaseException as error:  # handed to the consumer, who raises it
        batches.put(_Failure(error))
    else:
        batches.put(_Finished())


def _end(stop: threading.Event, slots: threading.Semaphore) -> None:
    stop.set()
    slots.release()
