"""Timing of back ends against each other, forward and backward."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

WARM_ROUNDS = 2
"""Not counted: libraries choose their kernels, allocators grow."""
_HOST_CACHE_BYTES = 64 * 2**20
_DEVICE_CACHE_BYTES = 512 * 2**20
"""Twice the largest cache that devices of the table in launch.py have (256 MB, MI300X)."""


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one call."""

    forward: float
    backward: float | None
    """None for operations without one."""


@dataclass(frozen=True)
class Spread:
    """Of several samples: the median, and where the middle three fifths lie."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """At least one sample."""
        fifths = (
            statistics.quantiles(samples, n=5, method="inclusive")
            if len(samples) > 1
            else [samples[0]] * 4
        )
        return Spread(statistics.median(samples), fifths[0], fifths[-1])


class Stopwatch:
    """Times on a device whose caches are emptied before each pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = _DEVICE_CACHE_BYTES if device.type == "cuda" else _HOST_CACHE_BYTES
        self._other = torch.empty(size, dtype=torch.uint8, device=device)

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Of one call; on a GPU from behind the emptying of the caches to its last kernel, the
        host's time to launch included where it takes longer than they do."""
        # Written, not read: what the caches held must make room for it.
        self._other.zero_()
        if self.device.type != "cuda":
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def sample(self, forward: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]) -> Sample:
        """One forward pass and, with leaves, its backward pass."""
        outputs: list[Tensor] = []
        first = self.milliseconds(lambda: outputs.extend(forward()))
        if not leaves:
            return Sample(first, None)
        gradients = [torch.ones_like(out) for out in outputs]
        second = self.milliseconds(lambda: torch.autograd.grad(outputs, leaves, gradients))
        return Sample(first, second)


def alternating(calls: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Samples of every call, all once a round, each round in another order: what slows a machine
    down for a while slows all of them."""
    found: dict[str, list[Sample]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(WARM_ROUNDS + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            sample = calls[name]()
            if number >= WARM_ROUNDS:
                found[name].append(sample)
    return found
