"""Whether two runs are the same, bit for bit."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zaya_train.config.errors import CheckpointError
from zaya_train.run import CHECKPOINTS
from zaya_train.train.metrics import read_metrics
from zaya_train.train.restore import find_newest, load_full

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side."""

    steps: int
    """Steps both runs report."""
    differing_steps: tuple[int, ...]
    """Steps whose loss or gradient norm differs in any bit, or that one run lacks."""
    tensors: int
    """Tensors of the final checkpoints: weights, biases, optimizer state."""
    differing_tensors: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.steps > 0 and not self.differing_steps and not self.differing_tensors

    def text(self) -> str:
        """One or two lines for a person."""
        if self.equal:
            return (
                f"losses and gradient norms of all {self.steps} steps and all {self.tensors} "
                "tensors of the final checkpoints are bitwise equal"
            )
        steps = ", ".join(map(str, self.differing_steps[:5])) or "none"
        names = ", ".join(self.differing_tensors[:5]) or "none"
        return (
            f"{len(self.differing_steps)} of {self.steps} steps differ (first: {steps}); "
            f"{len(self.differing_tensors)} of {self.tensors} tensors differ (first: {names})"
        )


def compare_runs(first: Path, second: Path) -> Comparison:
    """Losses, gradient norms and final checkpoints of two run directories."""
    curves = [_curve(run) for run in (first, second)]
    steps = sorted(curves[0].keys() | curves[1].keys())
    differing = tuple(s for s in steps if curves[0].get(s) != curves[1].get(s))
    states = [_final(run) for run in (first, second)]
    names = sorted(states[0].keys() | states[1].keys())
    unequal = tuple(n for n in names if not _same(states[0].get(n), states[1].get(n)))
    return Comparison(len(steps), differing, len(names), unequal)


def _curve(run: Path) -> dict[int, bytes]:
    """Bits of loss and gradient norm by step: a NaN of a skipped step equals itself."""
    rows = read_metrics(run)
    return {
        r["step"]: struct.pack("<dd", r["loss"], r["grad_norm"])
        for r in rows
        if r["kind"] == "step"
    }


def _final(run: Path) -> dict[str, torch.Tensor]:
    found, _ = find_newest(run / CHECKPOINTS)
    if found is None:
        raise CheckpointError(f"{run / CHECKPOINTS}: holds no checkpoint")
    return load_full(found.path)


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Equal bits: torch.equal would call 0.0 and -0.0 the same."""
    if first is None or second is None:
        return False
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (first, second)))
