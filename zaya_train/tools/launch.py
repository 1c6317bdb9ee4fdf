"""Training as a child process of `zaya smoke`: started, watched through its metrics, killed for
real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import ZayaError
from zaya_train.train.metrics import METRICS_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Launch:
    """One start of `zaya train` under torchrun."""

    run_dir: Path
    overrides: Sequence[str]
    ranks: int
    log: Path
    """Where the launcher's and the ranks' output goes."""


def start(launch: Launch) -> subprocess.Popen[bytes]:
    """torchrun with `ranks` processes on this machine; output appended to the log."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={launch.ranks}",
        "-m",
        "zaya_train",
        "train",
        *launch.overrides,
    ]
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    with launch.log.open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def watch(
    process: subprocess.Popen[bytes],
    launch: Launch,
    on_row: Callable[[dict[str, Any]], None],
    kill_at_step: int | None = None,
) -> int | None:
    """Report metrics rows until the process ends; its exit code.

    With `kill_at_step`, every process of the launch gets SIGKILL once that step is reported, and
    the result is None.
    """
    reader = _Tail(launch.run_dir / METRICS_FILE)
    while True:
        code = process.poll()
        for row in reader.new_rows():
            on_row(row)
            if kill_at_step is not None and row["kind"] == "step" and row["step"] >= kill_at_step:
                kill_tree(process.pid)
                process.wait()
                return None
        if code is not None:
            return code
        time.sleep(_POLL_SECONDS)


def run_to_end(launch: Launch, on_row: Callable[[dict[str, Any]], None]) -> None:
    """Start and wait; ZayaError with the end of the log when it fails."""
    process = start(launch)
    try:
        code = watch(process, launch, on_row)
    except BaseException:
        kill_tree(process.pid)
        raise
    if code:
        raise TrainingFailed(f"training ended with code {code}; {_last_error(launch.log)}")


class TrainingFailed(ZayaError):
    """A training process of the smoke run failed."""


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith(("error:", "rank "))]
    return f"{(errors or lines or ['no output'])[-1]} (whole log: {log})"


class _Tail:
    """Rows of a growing metrics file, each once and parsed once, from where it stood at
    construction. Non-finite numbers stay strings, as the file has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new_rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            # A killed writer's torn last line is cut off when the next one opens the file.
            self._offset = min(self._offset, os.fstat(file.fileno()).st_size)
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self._offset += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines()]


def descendants(pid: int) -> list[int]:
    """Process ids below `pid` (Linux /proc), children before grandchildren."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = _parent(entry)
            if parent is not None:
                children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def _parent(entry: Path) -> int | None:
    try:
        # The command name is in parentheses and may hold spaces: fields start behind the last one.
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and everything below it; torchrun's workers have sessions of their own,
    so killing the launcher's group would leave them running."""
    for victim in [pid, *descendants(pid)]:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
