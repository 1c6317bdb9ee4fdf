"""Run a test body on several gloo ranks, each a forked process of its own.

Forking a process that has torch imported starts a rank in milliseconds; spawning pays the import in
every rank. Four things make the fork safe here. OpenMP's thread pool does not survive a fork, so a
child that asked for two threads could wait forever for a thread that does not exist: every child
computes with one thread from its first line on (this also keeps four ranks fair on two cores).
CUDA does not survive a fork either, so a parent that has initialised it is refused. What the parent
left to its garbage collector, a process group for one, is never collected in a child, where its
threads would be waited for. And the ranks meet through a file in a fresh temporary directory, so no
port can collide.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch._dynamo  # DTensor imports it at its first operation: 1.2 s, here once for all ranks
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.context import ForkProcess

T = TypeVar("T")
PATIENCE_SECONDS = 540.0
"""For ranks that need seconds, on a machine that others have loaded."""
GRACE_SECONDS = 3.0
"""How long the other ranks may take to report once one has failed."""


class RankError(Exception):
    """A rank failed, died or did not finish; the message holds its traceback."""


@dataclass(frozen=True)
class _Meeting:
    store: Path
    world_size: int
    timeout_seconds: float


@dataclass
class _Child:
    process: ForkProcess
    pipe: multiprocessing.connection.Connection
    outcome: tuple[str, Any] | None = None

    def state(self) -> str:
        if self.outcome:
            return self.outcome[0]
        code = self.process.exitcode
        if code is None:
            return "still running"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def run_ranks(
    fn: Callable[..., T], world_size: int, *args: Any, timeout: float = PATIENCE_SECONDS
) -> list[T]:
    """Call `fn(*args)` on `world_size` ranks of a gloo process group; their values in rank order.

    Args:
        timeout: seconds until all ranks are killed; also the collectives' own timeout.

    Raises:
        RankError: with the traceback of the first rank that failed and the state of all others.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError("run_ranks forks, and CUDA is initialised in this process already")
    with tempfile.TemporaryDirectory() as folder:
        meeting = _Meeting(Path(folder) / "store", world_size, timeout)
        children = [_start(fn, args, rank, meeting) for rank in range(world_size)]
        try:
            failed = _collect(children, time.monotonic() + timeout)
            if failed is not None:
                raise RankError(_report(children, failed))
            unfinished = [rank for rank, child in enumerate(children) if child.outcome is None]
            if unfinished:
                raise RankError(f"not finished after {timeout:g} s\n{_states(children)}")
        finally:
            _end(children)
    return [child.outcome[1] for child in children if child.outcome]


@contextmanager
def ranks_running(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE_SECONDS
) -> Iterator[list[ForkProcess]]:
    """The processes of `world_size` ranks that run `fn(*args)`, to be signalled by the test.

    What they return or raise is lost; all are killed when the context ends.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = _Meeting(Path(folder) / "store", world_size, timeout)
        children = [_start(fn, args, rank, meeting) for rank in range(world_size)]
        try:
            yield [child.process for child in children]
        finally:
            _end(children)


def _end(children: list[_Child]) -> None:
    for child in children:
        child.process.kill()
        child.process.join()
        child.pipe.close()


def _start(fn: Callable[..., Any], args: tuple[Any, ...], rank: int, meeting: _Meeting) -> _Child:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    process = context.Process(target=_rank_main, args=(fn, args, rank, meeting, sender))
    process.daemon = True
    process.start()
    sender.close()
    return _Child(process, receiver)


def _rank_main(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    meeting: _Meeting,
    sender: multiprocessing.connection.Connection,
) -> None:
    # Objects left to the parent's collector may wait for threads that a fork does not have.
    gc.freeze()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    try:
        dist.init_process_group(
            "gloo",
            store=FileStore(str(meeting.store), meeting.world_size),
            rank=rank,
            world_size=meeting.world_size,
            timeout=timedelta(seconds=meeting.timeout_seconds),
        )
        message, done = pickle.dumps(("done", fn(*args))), True
    except BaseException:  # the parent re-raises it; CheckpointException is no Exception
        message, done = pickle.dumps(("failed", traceback.format_exc())), False
    sender.send_bytes(message)
    sender.close()
    if done:
        # A rank that ended while slower peers still connect to it would look like a lost one.
        with suppress(RuntimeError, ValueError):
            dist.barrier()
    # Peers of a failed rank wait for it; what is left of it must not wait for them in turn.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _collect(children: list[_Child], deadline: float) -> int | None:
    """Read outcomes until all are there or time is up; returns the first rank that failed."""
    first_failed = None
    open_pipes = {child.pipe: rank for rank, child in enumerate(children)}
    while open_pipes and (left := deadline - time.monotonic()) > 0:
        for ready in multiprocessing.connection.wait(list(open_pipes), timeout=left):
            assert isinstance(ready, multiprocessing.connection.Connection)
            rank = open_pipes.pop(ready)
            child = children[rank]
            try:
                child.outcome = pickle.loads(ready.recv_bytes())
            except EOFError:
                child.process.join()
            failed = child.outcome is None or child.outcome[0] == "failed"
            if failed and first_failed is None:
                first_failed = rank
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return first_failed


def _report(children: list[_Child], failed: int) -> str:
    outcome = children[failed].outcome
    details = outcome[1] if outcome else f"the process ended without a word\n{_states(children)}"
    others = "".join(
        f"\nrank {rank}: {child.outcome[1].strip().splitlines()[-1]}"
        for rank, child in enumerate(children)
        if rank != failed and child.outcome and child.outcome[0] == "failed"
    )
    return f"rank {failed} of {len(children)}:\n{details}{others}"


def _states(children: list[_Child]) -> str:
    return "\n".join(f"rank {rank}: {child.state()}" for rank, child in enumerate(children))
