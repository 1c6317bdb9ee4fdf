"""`zaya sync`: metrics.jsonl shown in TensorBoard and wandb, whole, however often it is asked.

Every replay begins with the run's first row and replaces what an earlier one left, so that rows of
steps that were rolled back meanwhile are marked, nothing is shown twice, and nothing is missing
after a replay that was killed. One run has one id at wandb, over all attempts and replays.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import ConfigError, StorageError
from zaya_train.tools.replay_sinks import SINKS, Sink
from zaya_train.train.metrics import METRICS_FILE, is_launch, rows_between

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
END_SECONDS = 60.0
"""Longest that a replay outlives the run it follows: a server may never answer."""
Ended = Callable[[float], bool]
"""Waits up to so many seconds for the run's end; whether it has ended."""


@dataclass(frozen=True)
class SyncRequest:
    """What `zaya sync` was asked for."""

    run_dir: Path
    sinks: tuple[str, ...]
    online: bool
    follow: bool


def sync(request: SyncRequest, console: Console) -> None:
    """Replay a run, or follow it until standard input ends.

    Raises:
        ConfigError: it has no metrics.
        DataError, StorageError: they cannot be read, or another process replays them just now.
    """
    run_dir, path = request.run_dir, request.run_dir / METRICS_FILE
    if request.follow:
        os.nice(19)
        _follow(request)
        return
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; nothing to replay")
    for name in request.sinks:
        with _alone(run_dir, name, wait_seconds=0.0):
            rows = replay(path, lambda name=name: SINKS[name](run_dir, request.online))  # type: ignore[misc]
        console.print(f"{name}: {rows:,} rows", markup=False)
    if "wandb" in request.sinks and not request.online:
        console.print(f"upload: wandb sync {run_dir}/wandb/offline-run-*", markup=False)


def _follow(request: SyncRequest) -> None:
    (name,) = request.sinks
    with _alone(request.run_dir, name, wait_seconds=2 * END_SECONDS):
        path = request.run_dir / METRICS_FILE
        replay(path, lambda: SINKS[name](request.run_dir, request.online), _input_ended)


def replay(path: Path, make: Callable[[], Sink], ended: Ended = lambda _: True) -> int:
    """All rows of `path` into a new sink, and those written until the run has `ended`; begins anew
    when a roll back supersedes rows that were shown as current. Returns the number of rows."""
    while not path.exists() or path.stat().st_size == 0:
        if ended(POLL_SECONDS):
            return 0
    while True:
        shown = _Shown(make())
        for row, superseded, position in _marked(path):
            shown.write(row, superseded, position)
        if _stream(path, shown, ended):
            return shown.rows
        log.info("steps were rolled back: replayed from the first row")


class _Shown:
    """A sink and what it was given."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.rows = 0
        self.position = 0
        """In the file, behind the last row."""
        self.highest = 0
        """Step shown as current."""

    def write(self, row: dict[str, Any], superseded: bool, position: int) -> None:
        self.sink.write(row, superseded)
        self.rows += 1
        self.position = position
        if not superseded:
            self.highest = max(self.highest, row["step"])


def _stream(path: Path, shown: _Shown, ended: Ended) -> bool:
    """Show what else is written; False as soon as it takes back what was shown."""
    while True:
        over = ended(POLL_SECONDS)
        for row, position in rows_between(path, shown.position):
            if is_launch(row) and row["step"] < shown.highest:
                shown.sink.close()
                return False
            shown.write(row, False, position)
        if over:
            shown.sink.close()
            return True


def _marked(path: Path) -> Iterator[tuple[dict[str, Any], bool, int]]:
    """(row, whether a later launch rolled it back, end of the row in the file) of what is there
    now. Reads twice: to hold no rows in memory, however many there are."""
    end, launches = 0, []
    for row, end in rows_between(path, 0):
        if is_launch(row):
            launches.append((end, row["step"]))
    lowest = _lowest_from(launches)
    passed = 0
    for row, position in rows_between(path, 0, end):
        while passed < len(launches) and launches[passed][0] <= position:
            passed += 1
        yield row, not is_launch(row) and row["step"] > lowest[passed], position


def _lowest_from(launches: Sequence[tuple[int, int]]) -> list[float]:
    """Lowest step of the launches from each one on; infinity behind the last."""
    lowest = [float("inf")]
    for _, step in reversed(launches):
        lowest.append(min(lowest[-1], step))
    return lowest[::-1]


def _input_ended(seconds: float) -> bool:
    """Whether the run has closed our standard input, which it never writes to. From then on this
    process has END_SECONDS, whatever a library waits for."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    if ready:
        timer = threading.Timer(END_SECONDS, _end_all)
        timer.daemon = True
        timer.start()
    return bool(ready)


def _end_all() -> None:
    """This process and those that libraries started for it: the session is its own."""
    log.error("not finished %g s after the run's end: given up", END_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


@contextmanager
def _alone(run_dir: Path, name: str, wait_seconds: float) -> Iterator[None]:
    """No other process replays the run into `name` meanwhile."""
    path = run_dir / "logs" / f"replay-{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    with path.open("a") as stream:
        while not _locked(stream.fileno()):
            if time.monotonic() >= deadline:
                raise StorageError(f"{run_dir}: a run, or another zaya sync, feeds {name} just now")
            time.sleep(POLL_SECONDS)
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("no locks on this file system: %s", error)
    return True
