"""`zaya sync`: metrics.jsonl shown in TensorBoard and wandb, whole, however often it is asked.

Every replay begins with the run's first row and replaces what an earlier one left, so that rows of
steps that were rolled back meanwhile are marked, nothing is shown twice, and nothing is missing
after a replay that was killed. One run has one id at wandb, over all attempts and replays.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import ConfigError, StorageError
from zaya_train.tools.replay_sinks import SINKS, Sink
from zaya_train.train.metrics import METRICS_FILE, is_launch, rows_between

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
END_SECONDS = 60.0
"""Longest that a replay outlives the run it follows: a server may never answer."""
WAIT_SECONDS = END_SECONDS + 10.0
"""Longest wait for another process's replay: one whose run is over has ended by then."""
Ended = Callable[[float], bool]
"""Waits up to so many seconds for the run's end; whether it has ended."""


@dataclass(frozen=True)
class SyncRequest:
    """What `zaya sync` was asked for."""

    run_dir: Path
    sinks: tuple[str, ...]
    online: bool
    follow: bool


class BusyError(StorageError):
    """Another process replays this run just now."""


def sync(request: SyncRequest, console: Console) -> None:
    """Replay a run, or follow it until standard input ends.

    Raises:
        ConfigError: it has no metrics.
        DataError, StorageError: they cannot be read, or another process replays them just now; the
            sinks that none feeds are replayed before.
    """
    run_dir, path = request.run_dir, request.run_dir / METRICS_FILE
    if request.follow:
        _follow(request)
        return
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; nothing to replay")
    busy: dict[str, str] = {}
    deadline = time.monotonic() + WAIT_SECONDS
    for name in request.sinks:
        try:
            with _alone(run_dir, name, deadline):
                rows = replay(path, lambda name=name: SINKS[name](run_dir, request.online))  # type: ignore[misc]
        except BusyError as error:
            busy[name] = str(error)
            continue
        console.print(f"{name}: {rows:,} rows", markup=False)
    if "wandb" in request.sinks and "wandb" not in busy and not request.online:
        console.print(f"upload: wandb sync {run_dir}/wandb/offline-run-*", markup=False)
    if busy:
        raise BusyError("; ".join(busy.values()))


def _follow(request: SyncRequest) -> None:
    _give_way()
    over = threading.Event()
    # By a thread, before the rest: whatever that waits for, a library or a file system, may last.
    threading.Thread(target=_await_end, args=(over,), daemon=True).start()
    (name,) = request.sinks
    with _alone(request.run_dir, name, time.monotonic() + WAIT_SECONDS):
        path = request.run_dir / METRICS_FILE
        replay(path, lambda: SINKS[name](request.run_dir, request.online), over.wait)


def _await_end(over: threading.Event) -> None:
    """Set `over` when the run closes our standard input, which it never writes to; from then on
    this process has END_SECONDS, whatever a library waits for."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    over.set()
    # Nothing is left to give way to, and at the lowest share END_SECONDS may be too few.
    _share_of_session(0)
    time.sleep(END_SECONDS)
    message = "not finished %g s after the run's end: given up"
    teller = threading.Thread(target=log.error, args=(message, END_SECONDS), daemon=True)
    teller.start()
    teller.join(POLL_SECONDS)  # Our log may lie on the very file system that does not answer.
    # What libraries started ends by itself once this process is gone, as wandb-core does.
    os._exit(1)


def _give_way() -> None:
    """Lowest priority, of the session too: with autogroups the kernel shares a processor out among
    sessions first (sched(7)), and this process may have one of its own."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    _share_of_session(19)


def _share_of_session(nice: int) -> None:
    """Set it where the session is this process's own and the kernel has autogroups."""
    if os.getsid(0) != os.getpid():
        return
    for _ in range(20):
        try:
            Path("/proc/self/autogroup").write_text(str(nice), encoding="ascii")
            return
        except BlockingIOError:
            time.sleep(0.1)  # the kernel's limit for all users but root: one change in 0.1 s
        except OSError:
            return


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


@contextmanager
def _alone(run_dir: Path, name: str, deadline: float) -> Iterator[None]:
    """No other process replays the run into `name` meanwhile; waits for one up to `deadline`, of
    time.monotonic."""
    path = run_dir / "logs" / f"replay-{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        if not _locked(stream.fileno()):
            log.warning("%s: another process feeds %s just now; waiting for it", run_dir, name)
            while not _locked(stream.fileno()):
                if time.monotonic() >= deadline:
                    message = f"{run_dir}: a run, or another zaya sync, feeds {name} just now"
                    raise BusyError(message)
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
