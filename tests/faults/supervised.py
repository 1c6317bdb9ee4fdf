"""Runs under `zaya supervise`, started as a person would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.integration.runs import ENVIRONMENT

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence
    from pathlib import Path


STEPS = 30
CHANGES: dict[str, Any] = {
    "plan.phases.short.tokens": STEPS * 4 * 64,
    "plan.phases.short.schedule": {"kind": "constant"},
    "plan.phases.long.tokens": 2 * 2 * 128,
    "checkpoint.every_steps": 4,
    "logging.eval_every_steps": 0,
    "supervisor.backoff_seconds": 0.1,
    "supervisor.status_seconds": 0.05,
    # Hundreds of times what a part of a step takes: whoever is late here stands still.
    "supervisor.hang_seconds": 15.0,
}


class Supervised:
    """`zaya supervise` as a process of its own, and its ranks below it."""

    def __init__(
        self,
        overrides: Sequence[str],
        run_dir: Path,
        log: Path,
        *options: str,
        node: int = 0,
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.run_dir = run_dir
        self.log = log
        self._suffix = f"-node{node}" if node else ""
        command = [*prefix, sys.executable, "-m", "zaya_train", "supervise", *options, *overrides]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env={**ENVIRONMENT, **environment}, stdout=output, stderr=output
            )

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *_: object) -> None:
        # What the ranks do then is their tie to their supervisor.
        self.process.kill()
        self.process.wait()

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(timeout=500)

    def status(self) -> dict[str, Any]:
        path = self.run_dir / f"status{self._suffix}.json"
        values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return values

    def until(self, there: Callable[[], Any]) -> Any:
        """The first true value; AssertionError when the supervisor ends before."""
        while not (value := there()):
            alive = self.process.poll() is None
            assert alive or there(), self.output()
            time.sleep(0.005)
        return value

    def in_attempt(self, number: int) -> None:
        """Wait for that attempt to begin."""
        self.until(lambda: self.status().get("attempt", 0) >= number)

    def pid_of(self, rank: int, attempt: int) -> int:
        """Of a rank, once that attempt has made a step."""

        def find() -> int:
            status = self.status()
            rows = [row for row in status.get("ranks", []) if row["rank"] == rank]
            ready = status.get("attempt") == attempt and rows and rows[0]["step"] > 1
            return int(rows[0]["pid"]) if ready else 0

        pid = self.until(find)
        assert isinstance(pid, int)
        return pid

    def signal_rank(self, rank: int, attempt: int, number: signal.Signals) -> None:
        os.kill(self.pid_of(rank, attempt), number)

    def incidents(self) -> list[dict[str, Any]]:
        path = self.run_dir / f"incidents{self._suffix}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def output(self) -> str:
        return self.log.read_text(errors="replace")
