"""Local gloo ranks started by a tool itself, each a forked process of one thread."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo  # DTensor imports it at its first operation: here once for all ranks
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from zaya_train.config.errors import ZayaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.process import BaseProcess

TIMEOUT_SECONDS = 300.0
"""Until ranks that have not finished are killed."""


class RanksFailed(ZayaError):
    """A rank raised, died or hung; the message holds the last line it wrote."""


@dataclass(frozen=True)
class _Meeting:
    folder: Path
    world: int

    def result(self, rank: int) -> Path:
        return self.folder / f"result-{rank}.pt"

    def words(self, rank: int) -> Path:
        """What the rank wrote to its standard error."""
        return self.folder / f"words-{rank}.txt"


def on_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """function(*arguments) on every rank of a gloo group of `world`; its values by rank.

    Forked processes see the caller's module state. RanksFailed where one fails or time runs out.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        meeting = _Meeting(Path(folder), world)
        sys.stdout.flush()
        sys.stderr.flush()
        ranks: list[BaseProcess] = [
            context.Process(target=_rank, args=(function, arguments, rank, meeting))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            _join(ranks, meeting)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(meeting.result(rank), weights_only=False) for rank in range(world)]


def _rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, meeting: _Meeting
) -> None:
    torch.set_num_threads(1)
    # Both Python's and C's: a traceback, or what gloo says before it aborts.
    sys.stderr = meeting.words(rank).open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    dist.init_process_group(
        "gloo",
        store=FileStore(str(meeting.folder / "store"), meeting.world),
        rank=rank,
        world_size=meeting.world,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    torch.save(function(*arguments), meeting.result(rank))
    dist.destroy_process_group()


def _join(ranks: Sequence[BaseProcess], meeting: _Meeting) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    running: dict[Any, int] = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            late = ", ".join(map(str, running.values()))
            raise RanksFailed(f"rank {late} of {meeting.world}: not done in {TIMEOUT_SECONDS:g} s")
        for sentinel in ended:
            rank = running.pop(sentinel)
            ranks[rank].join()
            if ranks[rank].exitcode:
                raise RanksFailed(f"rank {rank} of {meeting.world}: {_last_words(meeting, rank)}")


def _last_words(meeting: _Meeting, rank: int) -> str:
    lines = meeting.words(rank).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "ended without a word"
