"""The side of the heartbeat that runs in every rank; `runtime.beats` has the other."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zaya_train.runtime.beats import (
    DIRECTORY,
    DUMP_SIGNAL,
    PARENT,
    UNKNOWN,
    Beat,
    beat_path,
    stacks_path,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_PROBE_EVERY_STEPS = 10
"""So that its cost does not count: 0.35 ms on a core (AMD EPYC); on a GPU it was not measured."""
_PROBES_KEPT = 5
"""An interrupted probe is noise; a slow device is slow in all five, which span fifty steps."""
_WAITS_KEPT = 20
"""One long wait in a while is no slow rank: the median passes over it."""
_PRODUCTS = 8
"""Enough that the launch of the first is little of the whole on a GPU."""
_GPU_WIDTH = 4096
"""Of a bf16 square (32 MB, kept): 1.1e12 operations in all, milliseconds by the data sheets."""
_CPU_WIDTH = 128
"""Of an fp32 square (64 KB): stays in a core's own cache, beside ranks that share the memory."""
_PR_SET_PDEATHSIG = 1


class Heartbeat:
    """Writes this rank's record; without a path it does nothing."""

    def __init__(self, path: Path | None, probe: Callable[[], float] | None = None) -> None:
        self._descriptor: int | None = None
        self._probe = probe
        self._step = self._marks = self._steps_done = 0
        self._phase = "start"
        self._work: list[float] = []
        self._data: list[float] = []
        self._step_seconds = 0.0
        if path is not None:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)

    def mark(self, phase: str, step: int | None = None) -> None:
        """A part of step number `step` begins; without a number, of the newest step."""
        self._phase = phase
        self._step = self._step if step is None else step
        if phase == "load":
            # The first step of every phase compiles and warms up.
            self._steps_done = 0
        self._marks += 1
        self._write()

    def step_done(self, seconds: float, data_seconds: float) -> None:
        """A step took `seconds`, of them `data_seconds` waiting for its rows."""
        self._steps_done += 1
        self._step_seconds = seconds
        self._data = [*self._data, data_seconds][-_WAITS_KEPT:]
        if self._descriptor is None:
            return
        if self._probe is not None and self._steps_done % _PROBE_EVERY_STEPS == 1:
            self._work = [*self._work, self._probe()][-_PROBES_KEPT:]
        self._write()

    def close(self) -> None:
        """Safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self) -> None:
        if self._descriptor is None:
            return
        beat = Beat(
            pid=os.getpid(),
            step=self._step,
            marks=self._marks,
            steps_done=self._steps_done,
            seconds=time.monotonic(),
            phase=self._phase,
            # What interrupts a piece of work is noise; the fastest of several says how slow the
            # device is.
            work_seconds=min(self._work) if len(self._work) == _PROBES_KEPT else UNKNOWN,
            data_seconds=(
                statistics.median(self._data) if len(self._data) == _WAITS_KEPT else UNKNOWN
            ),
            step_seconds=self._step_seconds,
        )
        os.pwrite(self._descriptor, beat.packed(), 0)


def start_heartbeat() -> Heartbeat:
    """This rank's heartbeat as the launch environment asks for it, which also arms the stack dump
    and ties the rank to its supervisor: when that dies, the rank hears SIGTERM, saves and ends."""
    directory = os.environ.get(DIRECTORY)
    if not directory:
        return Heartbeat(None)
    rank = int(os.environ.get("RANK", "0"))
    stacks = stacks_path(Path(directory), rank).open("ab", buffering=0)
    # The registration keeps the file open for the life of the process.
    faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True, chain=False)
    _end_with(int(os.environ.get(PARENT, "0")))
    heartbeat = Heartbeat(beat_path(Path(directory), rank), FixedWork())
    heartbeat.mark("start", 0)
    return heartbeat


def _end_with(parent: int) -> None:
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGTERM)


class FixedWork:
    """Seconds of products that always have the same size, on the device that trains."""

    def __init__(self) -> None:
        self._square: torch.Tensor | None = None

    def __call__(self) -> float:
        if self._square is None:
            # Not before training has begun: that is when the device is known.
            self._square = _square()
        square = self._square
        if square.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(square, square)
        if square.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def _square() -> torch.Tensor:
    # No random numbers: their generators belong to the run.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.ones(_GPU_WIDTH, _GPU_WIDTH, device="cuda", dtype=torch.bfloat16)
    return torch.ones(_CPU_WIDTH, _CPU_WIDTH)
