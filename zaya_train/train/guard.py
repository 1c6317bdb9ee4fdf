"""The guard: which steps change nothing, and what is written down about each.

A step's gradient norm and loss are equal on every rank, bit for bit, and so is the window of norms,
which travels in the checkpoint. So all ranks decide alike with no word more between them, and a
resumed run decides as the unbroken one did.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zaya_train.parallel.collectives import sum_over
from zaya_train.runtime.files import INCIDENTS_FILE, Records
from zaya_train.train.metrics import encode_floats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

    from zaya_train.config.faults import GuardConfig
    from zaya_train.optim.shards import Shard
    from zaya_train.train.state import TrainState

log = logging.getLogger(__name__)

_LEAST_SPREAD = 0.05
"""Of the mean; see GuardConfig.sigma."""
_SHOWN = 16
"""Parameters that a record names at most. What it says of ranks and their rows is whole, tens of
kilobytes on 1,024 ranks: it is what tells them apart, and only skipped steps leave one."""


class RollBack(Exception):
    """Go on from the newest checkpoint and pass over `avoided`, ranges [first, stop) of the phase's
    rows: those of earlier roll backs, which no checkpoint may know yet, and last the new one."""

    def __init__(self, phase_index: int, avoided: tuple[tuple[int, int], ...]) -> None:
        super().__init__(f"rows {avoided[-1][0]} to {avoided[-1][1] - 1}")
        self.phase_index = phase_index
        self.avoided = avoided


def norm_limit(norms: Sequence[float], config: GuardConfig) -> float:
    """Largest gradient norm that is no spike after `norms`; infinity while these are too few."""
    if not config.sigma or len(norms) < max(2, config.window_steps // 2):
        return math.inf
    mean = math.fsum(norms) / len(norms)
    spread = math.sqrt(math.fsum((norm - mean) ** 2 for norm in norms) / len(norms))
    return mean + config.sigma * max(spread, _LEAST_SPREAD * mean)


def remember(state: TrainState, norm: float, config: GuardConfig) -> TrainState:
    """The state with the norm of an applied step in its window."""
    return replace(state, norms=(*state.norms, norm)[-config.window_steps :])


def why_skipped(loss: float, norm: float, limit: float) -> str:
    """Why a step must not be applied; empty if it may."""
    if not math.isfinite(loss):
        return "loss not finite"
    if not math.isfinite(norm):
        return "gradient not finite"
    return "gradient spike" if norm > limit else ""


@dataclass(frozen=True)
class Finding:
    """Where a skipped step's trouble lies; equal on every rank."""

    rank_losses: tuple[float, ...]
    """Every rank's part of the loss, in world order."""
    loss_ranks: tuple[int, ...]
    """Ranks whose part is not finite: they made it, in the forward pass."""
    gradient_ranks: tuple[int, ...]
    """Ranks that hold gradient elements that are not finite, after the reduction."""
    layer_norms: dict[str, float]
    """Gradient norm of every block: `layers.3.moe`, `embedding` ..."""
    not_finite: tuple[str, ...]
    """Parameters with elements that are not finite, the first few."""


def examine(shards: Iterable[Shard], loss: Tensor, replicas: int) -> Finding:
    """Gather what a record tells; one collective, for skipped steps only.

    Args:
        loss: this rank's part of the step's loss.
        replicas: copies of the sharded parameters.
    """
    shards = list(shards)
    rank, world = dist.get_rank(), dist.get_world_size()
    squares = torch.stack([_square(shard) for shard in shards])
    own = torch.zeros(2, world, dtype=torch.float64, device=loss.device)
    own[0, rank] = loss.double()
    own[1, rank] = float(not bool(squares.isfinite().all()))
    packed = sum_over(torch.cat([own.flatten(), squares / replicas]))
    values = packed.tolist()
    losses, flags, whole = values[:world], values[world : 2 * world], values[2 * world :]
    blocks: dict[str, float] = {}
    for shard, square in zip(shards, whole, strict=True):
        block = _block(shard.name)
        blocks[block] = blocks.get(block, 0.0) + square
    names = [s.name for s, square in zip(shards, whole, strict=True) if not math.isfinite(square)]
    return Finding(
        rank_losses=tuple(losses),
        loss_ranks=tuple(r for r, value in enumerate(losses) if not math.isfinite(value)),
        gradient_ranks=tuple(r for r, flag in enumerate(flags) if flag),
        layer_norms={name: math.sqrt(square) for name, square in blocks.items()},
        not_finite=tuple(names[:_SHOWN]),
    )


def _square(shard: Shard) -> Tensor:
    return shard.grad.double().square().sum()


def _block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[0] == "layers" else parts[0]


@dataclass(frozen=True)
class Skipped:
    """One skipped step, for the record."""

    state: TrainState
    """After the step."""
    rows: int
    reason: str
    loss: float
    norm: float
    limit: float
    finding: Finding
    action: str


@dataclass(frozen=True)
class Guard:
    """The guard of one phase: its settings and where its records go."""

    config: GuardConfig
    incidents: Incidents
    phase: str
    rows_by_data_rank: Callable[[int], list[list[int]]]
    """Rows consumed before a step -> the rows every data rank read in it."""
    context_ranks: int = 1
    """Neighbouring ranks that share rows."""

    def record(self, skipped: Skipped) -> None:
        """Log the step and append its record to the incidents file."""
        state, finding = skipped.state, skipped.finding
        log.warning(
            "step %d skipped on all ranks (%s): loss %s, gradient norm %s, limit %.4g; number %d "
            "in a row, weights unchanged",
            state.step,
            skipped.reason,
            skipped.loss,
            skipped.norm,
            skipped.limit,
            state.skipped_in_a_row,
        )
        first = state.phase_rows - skipped.rows
        dealt = self.rows_by_data_rank(first)
        suspects = sorted({rank // self.context_ranks for rank in finding.loss_ranks})
        self.incidents.write(
            kind="skipped_step",
            step=state.step,
            phase=self.phase,
            phase_step=state.phase_step,
            reason=skipped.reason,
            action=skipped.action,
            in_a_row=state.skipped_in_a_row,
            loss=skipped.loss,
            grad_norm=skipped.norm,
            norm_limit=skipped.limit,
            norm_history=list(state.norms),
            rows=[first, state.phase_rows],
            rows_by_data_rank=dealt,
            suspect_rows=[row for rank in suspects for row in dealt[rank]],
            loss_ranks=list(finding.loss_ranks),
            gradient_ranks=list(finding.gradient_ranks),
            rank_losses=list(finding.rank_losses),
            layer_norms=finding.layer_norms,
            not_finite=list(finding.not_finite),
        )


class Incidents:
    """Appends records to `<run_dir>/incidents.jsonl`, one JSON object a line; metrics.py says how
    numbers that are not finite are written. Only the process with `enabled` writes."""

    def __init__(self, run_dir: Path, attempt: int, enabled: bool) -> None:
        self.path = run_dir / INCIDENTS_FILE
        self._records = Records(self.path, shared=True)
        self._attempt = attempt
        self._enabled = enabled

    def write(self, **values: Any) -> None:
        """Append one record; where the file system refuses it waits (runtime.files.Records)."""
        if not self._enabled:
            return
        record = {"wall_time": time.time(), "attempt": self._attempt, **values}
        line = json.dumps(encode_floats(record), allow_nan=False, separators=(",", ":"))
        self._records.append(line.encode())

    def close(self) -> None:
        """Safe to call twice."""
        self._records.close()
