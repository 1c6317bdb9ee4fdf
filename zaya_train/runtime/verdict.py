"""Who hangs and who is slow, from the ranks' words and the state of their processes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_train.config.errors import (
    EXIT_CONFIG,
    EXIT_NO_CHECKPOINT,
    EXIT_NUMERICS,
    EXIT_OK,
    EXIT_REQUEUE,
    EXIT_STORAGE,
)
from zaya_train.runtime.beats import SLOW_PHASES, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zaya_train.config.faults import SupervisorConfig
    from zaya_train.runtime.beats import Beat

_NOTICEABLE_SECONDS = 0.002
"""Differences below it are the machine's, not a rank's."""
_NOTICEABLE_SHARE = 0.1
"""Of a step: shorter waits for data are hidden by what else it does."""
_FRAMES = 3
_WAITING = ("torch/distributed/",)
"""Files at the top of a stack that waits for other ranks."""
STOPPED = {"T": "stopped by a signal", "t": "stopped by a debugger", "Z": "dead"}
"""Process states of Linux that nobody works in."""
_FINAL = (EXIT_CONFIG, EXIT_NO_CHECKPOINT, EXIT_STORAGE, EXIT_NUMERICS)


@dataclass(frozen=True)
class Watched:
    """A local rank as the supervisor sees it."""

    rank: int
    pid: int
    beat: Beat | None
    silent_seconds: float
    """Since its newest word, or since its start if it said none."""
    state: str
    """Of its process, a letter of /proc/PID/stat; empty if there is none."""


def limit_of(watched: Watched, config: SupervisorConfig) -> float:
    """How long this rank may be silent where it is."""
    beat = watched.beat
    if beat is None or not beat.steps_done or beat.phase in SLOW_PHASES:
        return config.slow_seconds
    return config.hang_seconds


def overdue(ranks: list[Watched], config: SupervisorConfig) -> list[Watched]:
    """Ranks that have been silent for too long: those that hang and those that wait for them."""
    return [watched for watched in ranks if watched.silent_seconds > limit_of(watched, config)]


def culprits(ranks: list[Watched], stacks: Mapping[int, str]) -> list[tuple[int, str]]:
    """Ranks that hold up the others, and why these; all with "unknown" if nothing tells them apart.

    Args:
        ranks: all local ranks.
        stacks: by rank, what it wrote when it was asked for its stacks.
    """
    stopped = [(w.rank, STOPPED[w.state]) for w in ranks if w.state in STOPPED]
    if stopped:
        return stopped
    counts = {w.rank: w.beat.marks if w.beat else 0 for w in ranks}
    least = min(counts.values())
    behind = [rank for rank, count in counts.items() if count == least]
    if len(behind) < len(ranks):
        return [(rank, "behind the others") for rank in behind]
    busy = [w.rank for w in ranks if not waits_for_ranks(stacks.get(w.rank, ""))]
    if busy and len(busy) < len(ranks):
        return [(rank, "not waiting for other ranks") for rank in busy]
    return [(w.rank, "unknown") for w in ranks]


def waits_for_ranks(stacks: str) -> bool:
    """Whether the main thread of a faulthandler dump stands in torch's communication."""
    threads = stacks.split("\n\n")
    main = next((t for t in threads if t.lstrip().startswith("Current thread")), threads[-1])
    frames = [line for line in main.splitlines() if line.lstrip().startswith("File")]
    return any(mark in line for line in frames[:_FRAMES] for mark in _WAITING)


def stragglers(ranks: list[Watched], factor: float) -> list[tuple[int, str, float, float]]:
    """Ranks whose own work, or wait for data, is `factor` times the median of the others on this
    node, as (rank, what, seconds, median)."""
    found = []
    for what in ("work_seconds", "data_seconds"):
        values = {w.rank: getattr(w.beat, what) for w in ranks if w.beat}
        known = {rank: value for rank, value in values.items() if value != UNKNOWN}
        if len(known) < 2:
            continue
        for rank, value in known.items():
            others = [other for r, other in known.items() if r != rank]
            middle = statistics.median(others)
            if value > factor * middle and value - middle > _noticeable(ranks, what):
                found.append((rank, what, value, middle))
    return found


def _noticeable(ranks: list[Watched], what: str) -> float:
    """Smallest difference in seconds that counts."""
    if what == "work_seconds":
        return _NOTICEABLE_SECONDS
    step = max((w.beat.step_seconds for w in ranks if w.beat), default=0.0)
    return max(_NOTICEABLE_SECONDS, _NOTICEABLE_SHARE * step)


def exit_code_of(codes: Sequence[int], stopping: bool) -> int | None:
    """What an attempt whose ranks ended with `codes` means for the run; None: start it again.

    stopping: a stop signal was passed on to the ranks; then the run is to be requeued even where a
    rank did not end well, for its older checkpoints are whole.
    """
    final = sorted({code for code in codes if code in _FINAL})
    if final:
        return final[0]
    if all(code == EXIT_OK for code in codes):
        return EXIT_OK
    if stopping or all(code in (EXIT_OK, EXIT_REQUEUE) for code in codes):
        return EXIT_REQUEUE
    return None


def to_blame(codes: Sequence[int | None], texts: Mapping[int, str]) -> int | None:
    """Place of the exit code that explains the others, None if all are good.

    A signal is a cause; the exits it leads to elsewhere are consequences. Of equal ones that which
    left a word counts: the node's first rank speaks to the terminal.

    Args:
        codes: None for the living.
        texts: by place, what the rank printed.
    """
    bad = [i for i, code in enumerate(codes) if code not in (None, EXIT_OK, EXIT_REQUEUE)]
    return min(bad, key=lambda i: (codes[i] or 0, not texts.get(i), i), default=None)


def is_crash_loop(reached: Sequence[int], most: int) -> bool:
    """Whether the last `most` failures got no further than the first of them.

    reached: the step under way at each failure, in order.
    """
    last = reached[-most:]
    return len(last) == most and max(last) <= last[0]


def backoff(reached: Sequence[int], config: SupervisorConfig) -> float:
    """Seconds to wait after the newest failure: doubled by every one that got no further."""
    stuck = 0
    while stuck + 1 < len(reached) and reached[-1 - stuck] <= reached[-2 - stuck]:
        stuck += 1
    return min(config.most_backoff_seconds, config.backoff_seconds * 2.0**stuck)


def process_state(pid: int) -> str:
    """The state letter of a process; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The command name is in parentheses and may hold anything: fields start behind the last one.
    return text.rpartition(")")[2].split()[0]
