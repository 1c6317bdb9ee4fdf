"""What a rank tells the process that watches it: where it is, and how long its own work takes.

Every rank rewrites one small record in a file of its own, in a directory on its node that
`zaya supervise` made and named in ZAYA_HEARTBEAT_DIR; without that variable nothing is written.
Times are the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import statistics
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

DIRECTORY = "ZAYA_HEARTBEAT_DIR"
PARENT = "ZAYA_SUPERVISOR_PID"
DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write the stacks of all its threads; handled in C, also while Python is stuck."""
SLOW_PHASES = ("start", "load", "save")
"""Parts that may take long; a step's are data, forward, backward, exchange, optimizer, evaluate."""

_RECORD = struct.Struct("<iqqqd16sddd")
_PROBE_EVERY_STEPS = 10
_PROBES_KEPT = 5
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Beat:
    """A rank's newest word."""

    pid: int
    step: int
    """The step under way, counted from 1; in a save or an evaluation the one just done."""
    marks: int
    """Words so far. All ranks speak at the same places, so a smaller number is behind."""
    steps_done: int
    """By this process."""
    seconds: float
    """Monotonic time."""
    phase: str
    work_seconds: float
    """Median time of a fixed piece of work that waits for nobody; 0 before the first."""
    data_seconds: float
    """Median wait for data of the newest steps."""
    step_seconds: float


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

    def mark(self, phase: str, step: int) -> None:
        """A part of step number `step` begins."""
        self._phase, self._step = phase, step
        self._marks += 1
        self._write()

    def step_done(self, seconds: float, data_seconds: float) -> None:
        """A step took `seconds`, of them `data_seconds` waiting for its rows."""
        self._steps_done += 1
        self._step_seconds = seconds
        self._data = [*self._data, data_seconds][-_PROBE_EVERY_STEPS:]
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
        record = _RECORD.pack(
            os.getpid(),
            self._step,
            self._marks,
            self._steps_done,
            time.monotonic(),
            self._phase.encode(),
            statistics.median(self._work) if self._work else 0.0,
            statistics.median(self._data) if self._data else 0.0,
            self._step_seconds,
        )
        os.pwrite(self._descriptor, record + struct.pack("<I", zlib.crc32(record)), 0)


def read_beat(path: Path) -> Beat | None:
    """A rank's newest word; None before its first, and when read while being written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    record, check = data[: _RECORD.size], data[_RECORD.size :]
    if len(record) < _RECORD.size or check != struct.pack("<I", zlib.crc32(record)):
        return None
    pid, step, marks, steps_done, seconds, phase, work, waited, took = _RECORD.unpack(record)
    name = phase.rstrip(b"\0").decode()
    return Beat(pid, step, marks, steps_done, seconds, name, work, waited, took)


def beat_path(directory: Path, rank: int) -> Path:
    """Where a rank's record lies."""
    return directory / f"rank-{rank}"


def stacks_path(directory: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it gets DUMP_SIGNAL."""
    return directory / f"rank-{rank}.stacks"


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
    heartbeat = Heartbeat(beat_path(Path(directory), rank), _fixed_work)
    heartbeat.mark("start", 0)
    return heartbeat


def _end_with(parent: int) -> None:
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGTERM)


def _fixed_work() -> float:
    """Seconds of a product that always has the same size, on the device that trains."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    # No random numbers: their generators belong to the run.
    square = torch.ones(4096 if on_gpu else 128, 4096 if on_gpu else 128)
    if on_gpu:
        square = square.to("cuda", torch.bfloat16)
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(8):
        torch.mm(square, square)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin
