"""The processes that show a run in wandb and TensorBoard while it trains.

Each is `zaya sync RUN --follow`, which reads metrics.jsonl like anybody else: training writes no
row for it, waits for none of it and shares neither memory nor locks with it. A package that is
absent, crashes, hangs or is killed there takes nothing with it, and `zaya sync RUN` makes up for
whatever it did not show.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from zaya_train.config.schema import LoggingConfig

log = logging.getLogger(__name__)

LEAVE_SECONDS = 10.0
"""Longest that a run which is over waits for what shows it; they end by themselves later."""


class Replays:
    """The processes that one launch of a run starts; none may fail it.

    Leaving the context tells them that the run is over. A run that ended well waits a little and
    says which of them did not; a failing one has no time: its peers and the supervisor wait for
    what it has to say.
    """

    def __init__(self, chosen: LoggingConfig, run_dir: Path, enabled: bool) -> None:
        self._chosen = chosen
        self._run_dir = run_dir
        self._enabled = enabled
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        if kind is None:
            self._wait()

    def start(self) -> None:
        """Once the run is accepted: they replace what an earlier attempt's have left."""
        if not self._enabled:
            return
        if self._chosen.tensorboard:
            self._start("tensorboard")
        if self._chosen.wandb != "disabled":
            self._start("wandb", *(["--online"] if self._chosen.wandb == "online" else []))

    def _wait(self) -> None:
        deadline = time.monotonic() + LEAVE_SECONDS
        for name, process in self._processes.items():
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._tell(name, "has not finished")
                continue
            if code:
                self._tell(name, f"ended with {code}")

    def _start(self, name: str, *options: str) -> None:
        """Its standard input ends with this process, however that ends: its sign to finish."""
        command = [sys.executable, "-m", "zaya_train", "sync", str(self._run_dir.resolve())]
        try:
            output = log_of(self._run_dir, name)
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("ab") as stream:
                self._processes[name] = subprocess.Popen(
                    [*command, "--only", name, "--follow", *options],
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    # A session of its own: signals to the run's processes are not meant for it.
                    start_new_session=True,
                )
        except OSError as error:
            log.warning("%s not started, training goes on without it: %s", name, error)

    def _tell(self, name: str, what: str) -> None:
        log.warning(
            "the replay in %s %s (%s); complete it with: zaya sync %s",
            name,
            what,
            log_of(self._run_dir, name),
            self._run_dir,
        )


def log_of(run_dir: Path, name: str) -> Path:
    """Where the process that shows a run in `name` writes its own output."""
    return run_dir / "logs" / f"replay-{name}.log"


def _environment() -> dict[str, str]:
    """The run's, less what makes a rank of a process, on one thread; and this very package."""
    ours = str(Path(__file__).parents[2])
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in launch}
    path = [ours, *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
