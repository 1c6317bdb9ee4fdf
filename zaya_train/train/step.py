"""One optimizer step.

Legend: L layers, C router classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from zaya_train.config.errors import NumericsError
from zaya_train.parallel.collectives import sum_over
from zaya_train.train.batch import wrapped_sum
from zaya_train.train.guard import examine, why_skipped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from zaya_train.model.zaya import ZayaModel
    from zaya_train.optim.optimizer import Optimizer
    from zaya_train.optim.shards import Shard
    from zaya_train.parallel.fsdp import Reduction
    from zaya_train.train.batch import Batch
    from zaya_train.train.guard import Finding


@dataclass(frozen=True)
class Rates:
    """Settings of one step that follow from the schedule."""

    muon: float
    adamw: float
    clip_norm: float
    """0: no clipping."""
    z_loss: float = 0.0
    """optim.z_loss."""
    norm_limit: float = math.inf
    """Largest gradient norm of a step that is applied (train.guard)."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on every rank."""

    loss: float
    """Cross-entropy, mean over the step's supervised tokens; without `z_loss`."""
    grad_norm: float
    """Before clipping."""
    supervised: int
    load: Tensor
    """[L, C] fp64 token counts."""
    applied: bool
    """False: not finite, so neither weights nor optimizer state changed."""
    stop_signal: int
    """Largest signal number any rank has received, 0 for none."""
    fingerprint: int = 0
    """Sum of the fingerprints of all ranks' rows modulo 2^64, signed."""
    reason: str = ""
    """Why the step was not applied."""
    finding: Finding | None = None
    """Where that lies; None for applied steps and rows passed over."""
    pairs: int = 0
    """Pairs of a query and a key it may see, of all ranks' rows."""
    z_loss: float = 0.0
    """Mean over the same tokens of what was added to their loss (Rates.z_loss)."""


def unmarked(phase: str) -> None:
    """Nobody watches the phases of the step."""


def train_step(
    model: ZayaModel,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    rates: Rates,
    reduction: Reduction,
    stop_signal: int = 0,
    mark: Callable[[str], None] = unmarked,
) -> StepResult:
    """Count supervised tokens globally, forward and backward, clip, check finite, update.

    `batches` are the rank's micro-batches. The loss is a sum over supervised tokens divided by
    their global count, so neither accumulation nor layout changes its weights. `stop_signal`
    rides along on the step's own reduction. `mark` is told what begins: forward, backward, exchange
    (of losses, loads and norms; gradients are exchanged in the backward pass) and optimizer.

    What the step does next (skip, scale, update) follows from numbers that are equal on every rank.
    NumericsError on all ranks, with nothing updated, where replicas disagree on the gradient.
    """
    counts = _count(batches)
    own_losses, load = _accumulate(
        model, batches, counts[0].clamp_min(1), rates.z_loss, reduction, mark
    )
    mark("exchange")
    losses, load, heard = _reduce(own_losses, load, stop_signal)
    shards = optimizer.shards.values()
    norm = global_norm(shards, reduction.replicas)
    loss, z_loss = losses.tolist()
    reason = why_skipped(loss, norm, rates.norm_limit)
    finding = examine(shards, own_losses[0], reduction.replicas) if reason else None
    if not reason:
        mark("optimizer")
        _clip(shards, norm, rates.clip_norm)
        optimizer.step(rates.muon, rates.adamw, load.float())
    model.zero_grad(set_to_none=True)
    # Waits for the device behind the optimizer, so that a step's seconds have all of it.
    supervised, fingerprint, pairs = counts.tolist()
    return StepResult(
        loss=loss - z_loss,
        grad_norm=norm,
        supervised=supervised,
        load=load,
        applied=not reason,
        stop_signal=heard,
        fingerprint=fingerprint,
        reason=reason,
        finding=finding,
        pairs=pairs,
        z_loss=z_loss,
    )


def pass_over(optimizer: Optimizer, batches: Sequence[Batch], stop_signal: int = 0) -> StepResult:
    """A step over rows that a roll back decided to avoid: counted, and nothing else."""
    supervised, fingerprint, _ = _count(batches).tolist()
    load = torch.zeros_like(optimizer.balancing.first, dtype=torch.float64)
    _, load, heard = _reduce(load.new_full((2,), math.nan), load, stop_signal)
    return StepResult(
        loss=math.nan,
        grad_norm=math.nan,
        supervised=supervised,
        load=load,
        applied=False,
        stop_signal=heard,
        fingerprint=fingerprint,
        reason="rows passed over",
        z_loss=math.nan,
    )


def _count(batches: Sequence[Batch]) -> Tensor:
    """[3] int64: supervised tokens, fingerprint and attention's pairs of all ranks' rows."""
    # int64 sums wrap around, which is what a sum of fingerprints means.
    fingerprint = wrapped_sum(b.fingerprint for b in batches)
    own = (sum(b.supervised for b in batches), fingerprint, sum(b.pairs for b in batches))
    counts = torch.tensor(own, dtype=torch.int64, device=batches[0].tokens.device)
    return sum_over(counts)


def _accumulate(
    model: ZayaModel,
    batches: Sequence[Batch],
    count: Tensor,
    z_loss: float,
    reduction: Reduction,
    mark: Callable[[str], None],
) -> tuple[Tensor, Tensor]:
    """Gradients of all micro-batches, reduced after the last; this rank's load, and its loss with
    what of it is z-loss [2]."""
    losses, added, loads = [], [], []
    for i, batch in enumerate(batches):
        reduction.prepare(model, last=i == len(batches) - 1)
        mark("forward")
        out = model(batch.tokens, batch.labels, batch.layout, z_loss)
        loss = out.loss / count
        mark("backward")
        loss.backward()
        losses.append(loss.detach())
        added.append(out.z_loss / count)
        loads.append(out.load)
    own = torch.stack([torch.stack(losses).sum(), torch.stack(added).sum()])
    return own, torch.stack(loads).sum(dim=0)


def _reduce(losses: Tensor, load: Tensor, stop_signal: int) -> tuple[Tensor, Tensor, int]:
    """One all-reduce for everything a step reports, of losses [2] and load. A sum of signals would
    name no signal, so each number has its own place."""
    signals = torch.zeros(64, dtype=torch.float64, device=losses.device)
    if stop_signal:
        signals[stop_signal] = 1
    # fp64 keeps token counts exact to 2^53.
    packed = sum_over(torch.cat([losses.double(), signals, load.double().flatten()]))
    heard = packed[2:66].nonzero()
    return packed[:2], packed[66:].view(load.shape), int(heard.max()) if heard.numel() else 0


def global_norm(shards: Iterable[Shard], replicas: int) -> float:
    """L2 norm of the whole gradient, the same bits on every rank, with one collective.

    Local shards partition every parameter over the ranks of a replica, and world ranks are numbered
    replica by replica. fp64 sums of squares make the result independent of how parameters are
    grouped. Every rank's sum has its own place in the reduction and all ranks add them in the
    same order, so the norm does not depend on how the library sums: up to two ranks the bits are
    those of a reduced sum, beyond that the last ones may differ from it.

    NumericsError on every rank if replicas, whose gradients come out of one all-reduce, hold other
    bits: a flipped one would otherwise make one replica skip, scale or drift by itself.
    """
    used = [shard.grad for shard in shards if shard.local.numel()]
    squares = torch.stack([gradient.double().square().sum() for gradient in used]).sum()
    # Integers add up exactly in any order, so equal gradients have equal sums on any hardware.
    bits = torch.stack([gradient.float().view(torch.int32).sum() for gradient in used]).sum()
    places = bits.new_zeros(2, dist.get_world_size())
    places[:, dist.get_rank()] = torch.stack([squares.view(torch.int64), bits])
    # As integers: a sum of one number's bits and zeros is that number, NaN or not.
    ranks = sum_over(places).cpu().view(2, replicas, -1)
    norms = ranks[0].view(torch.float64).sum(dim=1).sqrt().tolist()
    _check_replicas(norms, ranks[1])
    return float(norms[0])


def _check_replicas(norms: list[float], bits: Tensor) -> None:
    """`norms` per replica; `bits` [replicas, ranks of a replica]."""
    # Where all are not finite all skip; which NaN a sum of NaNs gives is not defined.
    if not any(map(math.isfinite, norms)) or bool((bits == bits[0]).all()):
        return
    kinds: dict[tuple[int, ...], list[int]] = {}
    for replica, own in enumerate(bits.tolist()):
        kinds.setdefault(tuple(own), []).append(replica)
    found = "; ".join(
        f"norm {norms[alike[0]]!r} on replica {_numbers(alike)}" for alike in kinds.values()
    )
    parts = (bits != bits[0]).any(dim=0).nonzero().flatten()
    places = [int(part) + bits.shape[1] * r for part in parts for r in range(len(norms))]
    raise NumericsError(
        f"replicas disagree on the reduced gradient: {found}; copies on ranks {_numbers(places)} "
        "must be equal and are not (memory or network corrupts data); nothing was updated"
    )


def _numbers(numbers: list[int]) -> str:
    """The first few of them."""
    more = f" and {len(numbers) - 16} more" if len(numbers) > 16 else ""
    return ", ".join(map(str, numbers[:16])) + more


def _clip(shards: Iterable[Shard], norm: float, clip_norm: float) -> None:
    if clip_norm <= 0 or norm <= clip_norm:
        return
    factor = clip_norm / norm
    for shard in shards:
        if shard.parameter.grad is not None:
            shard.grad.mul_(factor)
