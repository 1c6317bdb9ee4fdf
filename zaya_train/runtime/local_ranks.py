"""The ranks of one node as child processes of their supervisor."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_train.runtime.beats import (
    DIRECTORY,
    DUMP_SIGNAL,
    PARENT,
    beat_path,
    read_beat,
    stacks_path,
)
from zaya_train.runtime.files import storing
from zaya_train.runtime.verdict import STOPPED, Watched, process_state

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

_DUMP_SECONDS = 3.0


@dataclass(frozen=True)
class Launch:
    """What to start on this node."""

    command: tuple[str, ...]
    """Of one rank; the environment tells it which."""
    run_dir: Path
    ranks: int
    """On this node."""
    nodes: int = 1
    node_rank: int = 0
    master: tuple[str, int] | None = None
    """Host and port where the ranks of all nodes meet; None on a single node, where a free port of
    this machine is taken."""


class LocalRanks:
    """Started on construction; `kill` ends whatever is left."""

    def __init__(self, launch: Launch, beats: Path, logs: Path) -> None:
        self._beats = beats
        self.logs = logs
        self.first_rank = launch.node_rank * launch.ranks
        with storing(logs):
            logs.mkdir(parents=True)
        self._started = time.monotonic()
        common = _environment(launch, beats)
        self._processes = [self._start(launch, common, local) for local in range(launch.ranks)]

    def _start(self, launch: Launch, common: dict[str, str], local: int) -> subprocess.Popen[bytes]:
        rank = self.first_rank + local
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(local)}
        with storing(self.logs), self._output(rank).open("wb") as output:
            # The node's first rank speaks to the terminal, progress bar included.
            target = None if local == 0 else output
            # Sessions of their own: a key press reaches the supervisor alone, which passes it on.
            return subprocess.Popen(
                launch.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=target,
                start_new_session=True,
            )

    def output(self, rank: int) -> str:
        """What a rank other than the node's first has printed."""
        return self._output(rank).read_text(encoding="utf-8", errors="replace").strip()

    def _output(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.out"

    def codes(self) -> list[int | None]:
        """Exit codes in rank order, negative signal numbers included; None for the living."""
        return [process.poll() for process in self._processes]

    def watched(self) -> list[Watched]:
        """Every rank as it stands."""
        found, now = [], time.monotonic()
        for local, process in enumerate(self._processes):
            rank = self.first_rank + local
            beat = read_beat(beat_path(self._beats, rank))
            silent = now - max(beat.seconds if beat else 0.0, self._started)
            found.append(Watched(rank, process.pid, beat, silent, process_state(process.pid)))
        return found

    def send(self, number: signal.Signals) -> None:
        """A signal to every living rank."""
        for process in self._processes:
            process.send_signal(number)

    def stacks(self) -> dict[int, str]:
        """Stacks of all ranks that can write them, also left beside their logs."""
        asked = [w for w in self.watched() if w.beat and w.state and w.state not in STOPPED]
        for watched in asked:
            with suppress(ProcessLookupError):
                os.kill(watched.pid, DUMP_SIGNAL)
        deadline = time.monotonic() + _DUMP_SECONDS
        sizes: dict[int, int] = {}
        while time.monotonic() < deadline:
            before, sizes = sizes, {w.rank: _size(stacks_path(self._beats, w.rank)) for w in asked}
            if sizes == before and all(sizes.values()):
                break
            time.sleep(0.2)
        texts = {}
        for watched in asked:
            data = stacks_path(self._beats, watched.rank).read_bytes()
            texts[watched.rank] = data.decode(errors="replace")
            try:
                (self.logs / f"rank-{watched.rank}.stacks").write_bytes(data)
            except OSError as error:
                log.warning("%s: stacks of rank %d not kept: %s", self.logs, watched.rank, error)
        return texts

    def kill(self) -> None:
        """SIGKILL for every rank and what it started; returns when they are gone."""
        for process in self._processes:
            # Also after the rank itself has ended: its session may hold others.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()


def _environment(launch: Launch, beats: Path) -> dict[str, str]:
    host, port = launch.master or ("127.0.0.1", _free_port())
    return {
        **os.environ,
        "WORLD_SIZE": str(launch.ranks * launch.nodes),
        "LOCAL_WORLD_SIZE": str(launch.ranks),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        DIRECTORY: str(beats),
        PARENT: str(os.getpid()),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
