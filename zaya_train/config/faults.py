"""Settings of what keeps a run alive: the guard inside it, the supervisor outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Steps that change nothing: whose gradient is not finite, or far larger than those before."""

    sigma: float = 6.0
    """A gradient norm beyond mean + sigma x deviation of the window is a spike; 0 lets spikes pass.
    The deviation counts as at least a twentieth of the mean, or a window of equal norms would call
    the next digit a spike."""
    window_steps: int = 128
    """Norms of the newest applied steps of the phase that are compared with; none is a spike until
    half as many are there."""
    most_skipped: int = 5
    """Steps skipped in a row after which `at_limit` happens. While they last no periodic checkpoint
    is saved, so they rotate none away; a stop signal or a phase's end among them does save, the
    weights of the last applied step."""
    at_limit: Literal["stop", "roll_back"] = "stop"
    """stop: exit code 5. roll_back: go on from the newest checkpoint and pass over the rows of the
    skipped steps when they come again."""
    most_roll_backs: int = 2
    """Roll backs in one phase; the next one stops the run."""


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """`zaya supervise`: when a rank counts as hanging, and when a run is started again."""

    hang_seconds: float = 240.0
    """Longest a rank may stay in one phase of a step, once its first step is done."""
    slow_seconds: float = 1800.0
    """The same for starting up with the first step, and for saving."""
    stop_seconds: float = 600.0
    """Longest between a stop signal and the end of all ranks: a step, an evaluation and a save."""
    same_step_failures: int = 3
    """Failures in a row, none of them further than the first, that are a crash loop (code 6)."""
    backoff_seconds: float = 5.0
    """Wait before the first restart, doubled by every failure without progress."""
    most_backoff_seconds: float = 300.0
    straggler_factor: float = 2.0
    """A rank is slow when its own work, or its waiting for data, takes this many times the median
    of the node's other ranks'; it is reported, not ended."""
    status_seconds: float = 5.0
    """Time between updates of status.json."""
