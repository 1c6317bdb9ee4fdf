"""Where the ranks of one attempt meet, and no rank of another attempt.

Supervisors of several nodes start ranks again without asking each other, so a rank may be back
before rank 0 has ended, and find the store of the attempt before: it would join a world that is
about to end, fail with it, and count as one failure more. Rank 0 therefore closes the meeting once
every rank is there; who comes later, or comes again, waits for the next one.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from zaya_train.config.errors import LostRankError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)

_CLOSED = "meeting/closed"
_RETRY_SECONDS = 0.5
_NAMED = 8
"""Missing ranks that a message names; the others it counts."""


@dataclass(frozen=True)
class Place:
    """Where, who, and until when."""

    host: str
    port: int
    rank: int
    world_size: int
    timeout_seconds: float


def meet(place: Place) -> Store:
    """The store of this attempt, once all its ranks have it; rank 0 hosts it.

    Raises:
        LostRankError: not all ranks came in time; rank 0 names them.
    """
    deadline = time.monotonic() + place.timeout_seconds
    store = _host(place, deadline) if place.rank == 0 else _join(place, deadline)
    # What was left of the time to meet is no limit for what comes after.
    store.set_timeout(timedelta(seconds=place.timeout_seconds))
    return store


def _join(place: Place, deadline: float) -> Store:
    told, heard = False, False
    while True:
        try:
            store = _connected(place, deadline)
            heard = True
            if _admitted(store, place, deadline):
                return store
            if not told:
                log.warning("rank 0 has not ended the attempt before this one: waiting for it")
                told = True
        except dist.DistNetworkError as error:
            # Rank 0 has ended, or has not begun.
            if time.monotonic() + _RETRY_SECONDS > deadline and not heard:
                raise LostRankError(
                    f"{_who(place)}: nobody answers within {_limit(place)}: rank 0 did not start "
                    "there, or the network does not lead there"
                ) from error
        if time.monotonic() + _RETRY_SECONDS > deadline:
            raise LostRankError(f"{_who(place)}: no new attempt began within {_limit(place)}")
        time.sleep(_RETRY_SECONDS)


def _who(place: Place) -> str:
    return f"rank {place.rank}: rank 0 at {place.host}:{place.port}"


def _limit(place: Place) -> str:
    return f"{place.timeout_seconds:g} s (runtime.init_timeout_seconds)"


def _key(rank: int) -> str:
    return f"meeting/joined/{rank}"


def _left(deadline: float) -> timedelta:
    # Zero would mean for ever.
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))


def _connected(place: Place, deadline: float) -> Store:
    return TCPStore(
        place.host,
        place.port,
        is_master=place.rank == 0,
        timeout=_left(deadline),
        wait_for_workers=False,
    )


def _host(place: Place, deadline: float) -> Store:
    """Wait for every rank, then say which coming of each is meant."""
    store = _connected(place, deadline)
    store.add(_key(0), 1)
    keys = [_key(rank) for rank in range(place.world_size)]
    try:
        store.wait(keys, _left(deadline))
    except dist.DistStoreError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise LostRankError(
            f"of {place.world_size} ranks {', '.join(map(str, missing[:_NAMED]))}{more} did not "
            f"come within {_limit(place)}"
        ) from error
    store.set(_CLOSED, json.dumps([int(number) for number in store.multi_get(keys)]))
    return store


def _admitted(store: Store, place: Place, deadline: float) -> bool:
    """Whether this coming of the rank takes part, once that is known.

    Raises:
        LostRankError: it is not known in time.
        DistNetworkError: rank 0 has gone.
    """
    joined = store.add(_key(place.rank), 1)
    try:
        store.wait([_CLOSED], _left(deadline))
    except dist.DistStoreError as error:
        raise LostRankError(
            f"rank {place.rank}: not all of {place.world_size} ranks came within {_limit(place)}; "
            "rank 0 names them"
        ) from error
    admitted: int = json.loads(store.get(_CLOSED))[place.rank]
    return admitted == joined
