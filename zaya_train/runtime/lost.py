"""Who is missing when a collective fails.

gloo says "connection closed by peer" or that a wait timed out, RCCL's watchdog names a collective;
neither names the rank that is gone. So every rank whose collective fails leaves a word in the
store that all ranks met through, waits a little for the others' words, and reports who left none,
with the mesh axes it shares with them.

A rank still waiting in another collective has not failed yet and leaves no word in time. The lost
rank is the one that every report names.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from zaya_train.config.errors import LostRankError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zaya_train.config.derive import Layout

GRACE_SECONDS = 5.0
"""How long others may take to leave their word."""
_MARKS = ("gloo", "closed by peer", "reset by peer", "Timed out waiting", "NCCL")


@contextmanager
def naming_lost_ranks(layout: Layout, limit_seconds: float) -> Iterator[None]:
    """Turn a failed collective in the body into LostRankError; other errors pass.

    `limit_seconds` is runtime.step_timeout_seconds, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        first_line = next(iter(str(error).encode("ascii", "ignore").decode().splitlines()), "")
        if not isinstance(error, dist.DistError) and not any(m in str(error) for m in _MARKS):
            raise
        missing = _missing()
        raise LostRankError(_report(layout, missing, limit_seconds, first_line)) from error


def _missing() -> list[int] | None:
    """Ranks without a word after the grace; None if the store is gone too."""
    rank, world = dist.get_rank(), dist.get_world_size()
    waiting = set(range(world)) - {rank}
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        store = _get_default_store()
        store.set(f"stuck/{rank}", "1")
        while waiting and time.monotonic() < deadline:
            waiting = {r for r in waiting if not store.check([f"stuck/{r}"])}
            time.sleep(0.1)
    except RuntimeError:
        return None
    return sorted(waiting)


def _report(
    layout: Layout, missing: list[int] | None, limit_seconds: float, first_line: str
) -> str:
    rule = (
        f"ranks must meet in every collective within {limit_seconds:g} s "
        f"(runtime.step_timeout_seconds): {first_line}"
    )
    if missing is None:
        return f"a collective failed and so did the store that would name the lost rank; {rule}"
    if not missing:
        return f"a collective failed although every rank answers; {rule}"
    named = "; ".join(
        f"rank {other} ({_relation(layout, dist.get_rank(), other)})" for other in missing[:8]
    )
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return f"no word from {named}{more}; {rule}"


def _relation(layout: Layout, rank: int, other: int) -> str:
    axes = layout.shared_axes(rank, other)
    return f"shares axis {', '.join(axes)}" if axes else "shares no axis but the world"
