"""What the balancing controller would have done under other gains, from a routing trace, without a
GPU.

Step by step the real controller (optim.balancing) runs on the CPU from the recorded moments. Its
input is the recorded load plus what the sample of tokens says would have changed:

    load' = load + (choices under the replayed biases - choices under the recorded ones) x N / T

with N tokens of the step and T of the sample. Under the recorded gains the biases are the recorded
ones, the difference is zero, and load' is the recorded load exactly, however small the sample. What
a replay cannot tell: weights learn from where tokens go, and here they do not.

Legend: N steps, L layers, C router classes, E experts, T sampled tokens.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from zaya_train.config.errors import DataError
from zaya_train.optim.balancing import BalancingController
from zaya_train.train.trace import ROUTING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from zaya_train.config.schema import BalancingConfig

_STEP = re.compile(r"step-(\d{8})\.npz")
_ROUNDING = 0.01
"""Of the learning rate, which an update is of the size of: what another device may round otherwise;
gains that differ by less are as good as the same."""
_LAST_DIGIT = 2e-7
"""Of a fp32 bias, which are below two."""


@dataclass(frozen=True)
class TracedStep:
    """One recorded step; train.trace has the shapes."""

    step: int
    counts: NDArray[np.int64]
    bias: NDArray[np.float32]
    first: NDArray[np.float32]
    second: NDArray[np.float32]
    steps: int
    probabilities: NDArray[np.float32]
    applied: bool


@dataclass(frozen=True)
class Replay:
    """What one set of gains did over the traced steps."""

    gains: BalancingConfig
    loads: NDArray[np.float64]
    """[N, L, C] tokens."""
    biases: NDArray[np.float32]
    """[N, L, C] that the steps chose with."""
    moved: NDArray[np.float64]
    """[N] share of the sampled choices that differ from the recorded gains'."""


def traced_files(run_dir: Path) -> dict[int, Path]:
    """Step -> file of the routing trace; empty where nothing was traced."""
    names = (run_dir / ROUTING).glob("*")
    return {int(match[1]): path for path in names if (match := _STEP.fullmatch(path.name))}


def read_trace(run_dir: Path) -> list[TracedStep]:
    """The newest unbroken row of traced steps; DataError where there is none or a file is bad."""
    found = traced_files(run_dir)
    if not found:
        raise DataError(
            f"{run_dir / ROUTING}: no routing trace; train with logging.trace_steps (and "
            "trace_first_step)"
        )
    last = max(found)
    first = last
    while first - 1 in found:
        first -= 1
    return [_read(number, found[number]) for number in range(first, last + 1)]


def as_recorded(
    trace: Sequence[TracedStep], num_experts: int, gains: BalancingConfig
) -> list[TracedStep]:
    """The longest part of the trace that the controller with `gains` made, the newest of equals.

    Files of attempts with other gains, and of steps that a roll back undid, may lie side by side:
    there a step's biases are not what the controller makes of the step before.
    """
    parts: list[list[TracedStep]] = [[]]
    for traced in trace:
        if parts[-1] and not _follows(parts[-1][-1], traced, num_experts, gains):
            parts.append([])
        parts[-1].append(traced)
    return max(reversed(parts), key=len)


def _follows(
    before: TracedStep, after: TracedStep, num_experts: int, gains: BalancingConfig
) -> bool:
    """Whether one update, of `before`, lies between the two controllers."""
    controller = _controller(before, num_experts, gains)
    if before.applied:
        controller.step(torch.from_numpy(before.counts).float())
    if int(controller.steps) != after.steps:
        return False
    made = torch.stack(controller.biases).numpy()
    return bool(np.abs(made - after.bias).max() <= _ROUNDING * gains.learning_rate + _LAST_DIGIT)


def _controller(begin: TracedStep, num_experts: int, gains: BalancingConfig) -> BalancingController:
    """As it stood before a step."""
    controller = BalancingController(list(torch.from_numpy(begin.bias.copy())), num_experts, gains)
    controller.first.copy_(torch.from_numpy(begin.first))
    controller.second.copy_(torch.from_numpy(begin.second))
    controller.steps.fill_(begin.steps)
    return controller


def replay(trace: Sequence[TracedStep], num_experts: int, gains: BalancingConfig) -> Replay:
    """Run the controller with `gains` over the trace."""
    controller = _controller(trace[0], num_experts, gains)
    loads, biases, moved = [], [], []
    for traced in trace:
        bias = torch.stack(controller.biases).numpy()
        load, share = _load(traced, bias)
        if traced.applied:
            controller.step(torch.from_numpy(load).float())
        loads.append(load)
        biases.append(bias)
        moved.append(share)
    return Replay(gains, np.stack(loads), np.stack(biases), np.array(moved))


def _load(traced: TracedStep, bias: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """[L, C] tokens under `bias`, and the share of sampled tokens that chose anew."""
    load = traced.counts.astype(np.float64)
    classes = load.shape[1]
    sampled = traced.probabilities.shape[1]
    if not sampled:
        return load, 0.0
    recorded = _choices(traced.probabilities, traced.bias)
    now = _choices(traced.probabilities, bias)
    change = (_count(now, classes) - _count(recorded, classes)) / sampled
    tokens = load.sum(axis=1, keepdims=True)
    load = load + change * tokens
    if (load < 0).any():  # a small sample says of a class more than the step had
        load = np.maximum(load, 0.0)
        load *= tokens / load.sum(axis=1, keepdims=True)
    return load, float((now != recorded).mean())


def _choices(probabilities: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.int64]:
    """[L, T]; the first of equals, as the router chooses."""
    chosen: NDArray[np.int64] = (probabilities + bias[:, None, :]).argmax(axis=2)
    return chosen


def _count(choice: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """[L, T] -> [L, C]."""
    return np.stack([np.bincount(layer, minlength=classes) for layer in choice])


def _read(step: int, path: Path) -> TracedStep:
    try:
        with np.load(path) as arrays:
            return TracedStep(
                step=step,
                counts=arrays["counts"],
                bias=arrays["bias"],
                first=arrays["first"],
                second=arrays["second"],
                steps=int(arrays["steps"]),
                probabilities=arrays["probabilities"],
                applied=bool(arrays["applied"]),
            )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a step of a routing trace ({error})") from error
