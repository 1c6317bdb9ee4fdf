"""Watching a run from outside its processes, and starting it again.

    starting -> running -> done                            exit 0
                        -> requeue                         exit 75, after a stop signal
                        -> failed                          exit 2, 3, 4, 5 as the ranks said
                        -> waiting -> starting ...         a rank died or hangs
                        -> failed                          exit 6, a crash loop

A launcher's own exit code says nothing (torchrun's is 1 whatever happened), so what a scheduler
needs stands in `<run_dir>/status.json`, replaced as a whole, and is this process's exit code.
Incidents (hangs, crashes, stragglers) are lines of `<run_dir>/incidents.jsonl`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import EXIT_CRASH_LOOP, EXIT_OK, EXIT_REQUEUE, StorageError
from zaya_train.runtime.beats import UNKNOWN
from zaya_train.runtime.files import INCIDENTS_FILE, Records, write_json
from zaya_train.runtime.local_ranks import LocalRanks
from zaya_train.runtime.signals import STOP_SIGNALS
from zaya_train.runtime.verdict import (
    backoff,
    culprits,
    exit_code_of,
    is_crash_loop,
    limit_of,
    overdue,
    stragglers,
    to_blame,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from zaya_train.config.faults import SupervisorConfig
    from zaya_train.runtime.local_ranks import Launch
    from zaya_train.runtime.verdict import Watched

log = logging.getLogger(__name__)

STATUS_FILE = "status.json"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""What the others get to say whom they miss, once a rank has died (runtime.lost)."""


@dataclass(frozen=True)
class Failure:
    """An attempt that ended badly."""

    attempt: int
    step: int
    """The furthest that a rank of this node had under way."""
    reason: str


class Supervisor:
    """One node's."""

    def __init__(self, launch: Launch, config: SupervisorConfig) -> None:
        self._launch = launch
        self._config = config
        self._attempt = _attempts(launch)
        self._failures: list[Failure] = []
        self._slow: set[tuple[int, str]] = set()
        self._signal: signal.Signals | None = None
        self._impatient = False
        self._watched: list[Watched] = []
        self._step = 0
        """The furthest of the attempt."""
        self._status_due = 0.0
        self._incidents = Records(launch.run_dir / self._named(INCIDENTS_FILE), shared=True)

    def run(self) -> int:
        """Until the run is done, stopped or given up; returns the exit code."""
        with self._hearing_signals(), closing(self._incidents):
            while True:
                codes, reason = self._one_attempt()
                code = exit_code_of(codes, self._signal is not None)
                if code is not None:
                    return self._ended(code, reason)
                failure = Failure(self._attempt, self._step, reason)
                self._failures.append(failure)
                self._incident("crash", reason=reason, exit_codes=codes)
                log.error("attempt %d failed at step %d: %s", self._attempt, failure.step, reason)
                reached = [past.step for past in self._failures]
                most = self._config.same_step_failures
                if is_crash_loop(reached, most):
                    log.error("crash loop: %d failures, none beyond step %d", most, reached[-most])
                    return self._ended(EXIT_CRASH_LOOP, reason)
                if not self._waited(backoff(reached, self._config)):
                    return self._ended(EXIT_REQUEUE, "stopped between two attempts")

    def _one_attempt(self) -> tuple[list[int], str]:
        """Start the ranks and stay until all are gone: exit codes, and why it ended if badly."""
        self._attempt += 1
        self._slow.clear()
        self._watched, self._step = [], 0
        logs = self._launch.run_dir / "logs" / self._named(f"attempt-{self._attempt:04d}")
        with tempfile.TemporaryDirectory(prefix="zaya-beats-") as beats:
            ranks = LocalRanks(self._launch, Path(beats), logs)
            log.info("attempt %d: %d ranks started", self._attempt, self._launch.ranks)
            try:
                reason = self._watch(ranks)
            finally:
                ranks.kill()
                # Ranks that end by themselves may have said more since the last look.
                self._note_step(ranks.watched())
            codes = [code or 0 for code in ranks.codes()]
        return codes, reason

    def _watch(self, ranks: LocalRanks) -> str:
        """Returns when all ranks ended, or must be ended: why, empty if nothing is wrong."""
        passed_on, limit, reason = False, float("inf"), ""
        while True:
            codes = ranks.codes()
            if None not in codes:
                return _reason(ranks, codes)
            if not reason and any(code not in (None, EXIT_OK, EXIT_REQUEUE) for code in codes):
                reason = _reason(ranks, codes)
                limit = min(limit, time.monotonic() + _GRACE_SECONDS)
            if self._signal and not passed_on:
                log.warning("%s: all ranks save and end", self._signal.name)
                ranks.send(self._signal)
                passed_on = True
                limit = min(limit, time.monotonic() + self._config.stop_seconds)
            if self._impatient:
                return reason or "asked twice to stop"
            if time.monotonic() > limit:
                return reason or self._late(ranks)
            self._watched = ranks.watched()
            self._note_step(self._watched)
            if not reason and overdue(self._watched, self._config):
                return self._hang(ranks)
            self._look_for_stragglers()
            self._report("stopping" if self._signal else "running")
            time.sleep(_POLL_SECONDS)

    def _hang(self, ranks: LocalRanks) -> str:
        """Name who hangs; one line."""
        stacks = ranks.stacks()
        named = culprits(self._watched, stacks)
        by_rank = {watched.rank: watched for watched in self._watched}
        lines = []
        for rank, why in named:
            watched = by_rank[rank]
            where = f"in {watched.beat.phase} of step {watched.beat.step}" if watched.beat else ""
            lines.append(
                f"rank {rank} hangs {where or 'before its first word'} ({why}; silent for "
                f"{watched.silent_seconds:.1f} s, limit {limit_of(watched, self._config):g} s)"
            )
        reason = "; ".join(lines)
        self._incident(
            "hang", reason=reason, named=[rank for rank, _ in named], stacks=str(ranks.logs)
        )
        return reason

    def _late(self, ranks: LocalRanks) -> str:
        """Ranks did not end after a stop signal."""
        # Before their stacks are asked for, of which a rank may die that has no handler yet.
        left = [ranks.first_rank + i for i, code in enumerate(ranks.codes()) if code is None]
        ranks.stacks()
        limit = self._config.stop_seconds
        reason = (
            f"ranks {', '.join(map(str, left))} did not end within {limit:g} s of the stop signal "
            "(supervisor.stop_seconds)"
        )
        log.error("%s; killed, the newest checkpoint stays", reason)
        self._incident("late", reason=reason, named=left, stacks=str(ranks.logs))
        return reason

    def _look_for_stragglers(self) -> None:
        for rank, what, seconds, median in stragglers(self._watched, self._config.straggler_factor):
            if (rank, what) not in self._slow:
                self._slow.add((rank, what))
                text = (
                    f"rank {rank} is slow: {what} {seconds:.4f}, median of the others {median:.4f}"
                )
                log.warning("%s", text)
                self._incident("straggler", reason=text, named=[rank])

    def _note_step(self, watched: list[Watched]) -> None:
        # A roll back begins again at an older step.
        self._step = max([self._step, *(w.beat.step for w in watched if w.beat)])

    def _waited(self, seconds: float) -> bool:
        """Sleep before the next attempt; False if a stop signal came."""
        log.info("next attempt in %.1f s", seconds)
        self._report("waiting", now=True)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._signal:
            time.sleep(_POLL_SECONDS)
        return self._signal is None

    def _ended(self, code: int, reason: str) -> int:
        states = {EXIT_OK: "done", EXIT_REQUEUE: "requeue"}
        self._report(states.get(code, "failed"), now=True, exit_code=code, reason=reason)
        if code not in states:
            log.error("ended with code %d: %s", code, reason)
        return code

    def _report(self, state: str, now: bool = False, **values: Any) -> None:
        """Replace the status file, if its time has come."""
        if not now and time.monotonic() < self._status_due:
            return
        self._status_due = time.monotonic() + self._config.status_seconds
        status = {
            "state": state,
            "exit_code": None,
            "reason": "",
            **values,
            "requeue": values.get("exit_code") == EXIT_REQUEUE,
            "attempt": self._attempt,
            "step": self._step,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "wall_time": time.time(),
            "ranks": [_row(watched) for watched in self._watched],
            "slow_ranks": sorted({rank for rank, _ in self._slow}),
            "failures": [vars(failure) for failure in self._failures],
        }
        try:
            write_json(self._launch.run_dir / self._named(STATUS_FILE), status)
        except StorageError as error:
            # Ranks that train must not end because a note about them cannot be written.
            log.warning("%s; training goes on", error)

    def _incident(self, kind: str, **values: Any) -> None:
        record = {"wall_time": time.time(), "kind": kind, "attempt": self._attempt}
        record |= {"step": self._step, "host": os.uname().nodename, **values}
        record["ranks"] = [_row(watched) for watched in self._watched]
        line = json.dumps(record, allow_nan=False, separators=(",", ":"))
        self._incidents.append(line.encode())

    def _named(self, name: str) -> str:
        """Every node but the first has files of its own: `status-node3.json`."""
        stem, dot, suffix = name.partition(".")
        return f"{stem}{_node_suffix(self._launch)}{dot}{suffix}"

    @contextmanager
    def _hearing_signals(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._heard) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        # A person who asks twice does not want to wait for a save.
        self._impatient = self._impatient or (self._signal is not None and number == signal.SIGINT)
        self._signal = self._signal or signal.Signals(number)


def _node_suffix(launch: Launch) -> str:
    return f"-node{launch.node_rank}" if launch.node_rank else ""


def _attempts(launch: Launch) -> int:
    """Number of the newest attempt that left logs, over all supervisors of this node."""
    suffix = _node_suffix(launch)
    names = [path.name for path in (launch.run_dir / "logs").glob(f"attempt-*{suffix}")]
    numbers = [name.removeprefix("attempt-").removesuffix(suffix) for name in names]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _row(watched: Watched) -> dict[str, Any]:
    beat = watched.beat
    return {
        "rank": watched.rank,
        "pid": watched.pid,
        "process_state": watched.state,
        "silent_seconds": round(watched.silent_seconds, 3),
        "phase": beat.phase if beat else "",
        "step": beat.step if beat else 0,
        "work_seconds": _known(beat.work_seconds) if beat else None,
        "data_seconds": _known(beat.data_seconds) if beat else None,
    }


def _known(seconds: float) -> float | None:
    return None if seconds == UNKNOWN else seconds


def _reason(ranks: LocalRanks, codes: list[int | None]) -> str:
    """The first rank that ended badly, and its last line; empty if none did."""
    texts = {i: ranks.output(ranks.first_rank + i) for i, code in enumerate(codes) if code}
    local = to_blame(codes, texts)
    if local is None:
        return ""
    code, rank = codes[local] or 0, ranks.first_rank + local
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = f": {texts[local].splitlines()[-1][:300]}" if texts[local] else ""
    return f"rank {rank}: {how}{last}"
