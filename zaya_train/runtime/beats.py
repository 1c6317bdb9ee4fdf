"""What a rank's newest word looks like and where it lies; no torch, for the process that watches.

Every rank rewrites one small record in a file of its own, in a directory on its node that
`zaya supervise` made and named in ZAYA_HEARTBEAT_DIR; without that variable nothing is written.
Times are the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import signal
import struct
import zlib
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

DIRECTORY = "ZAYA_HEARTBEAT_DIR"
PARENT = "ZAYA_SUPERVISOR_PID"
DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write the stacks of all its threads; handled in C, also while Python is stuck."""
SLOW_PHASES = ("start", "load", "save")
"""Parts that may take long; a step's are data, forward, backward, exchange, optimizer, evaluate."""

UNKNOWN = -1.0
"""Seconds that were not measured."""
_RECORD = struct.Struct("<iqqqd16sddd")


@dataclass(frozen=True)
class Beat:
    """A rank's newest word."""

    pid: int
    step: int
    """The step under way, counted from 1; in a save or an evaluation the one just done."""
    marks: int
    """Words so far. All ranks speak at the same places, so a smaller number is behind."""
    steps_done: int
    """Since the weights were loaded."""
    seconds: float
    """Monotonic time."""
    phase: str
    work_seconds: float
    """Shortest of the newest times of a fixed piece of work that waits for nobody; UNKNOWN while
    these are too few."""
    data_seconds: float
    """Median wait for data of the newest steps; UNKNOWN while these are too few."""
    step_seconds: float

    def packed(self) -> bytes:
        """The record, with its check sum."""
        values = astuple(self)
        record = _RECORD.pack(*values[:5], self.phase.encode(), *values[6:])
        return record + struct.pack("<I", zlib.crc32(record))


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
