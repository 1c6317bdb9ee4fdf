"""One optimizer step.

Legend: L layers, C router classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zaya_train.parallel.collectives import sum_over
from zaya_train.train.batch import wrapped_sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from zaya_train.model.zaya import ZayaModel
    from zaya_train.optim.optimizer import Optimizer
    from zaya_train.optim.shards import Shard
    from zaya_train.parallel.fsdp import Reduction
    from zaya_train.train.batch import Batch


@dataclass(frozen=True)
class Rates:
    """Settings of one step that follow from the schedule."""

    muon: float
    adamw: float
    clip_norm: float
    """0: no clipping."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on every rank."""

    loss: float
    """Mean over the step's supervised tokens."""
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


def train_step(
    model: ZayaModel,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    rates: Rates,
    reduction: Reduction,
    stop_signal: int = 0,
) -> StepResult:
    """Count supervised tokens globally, forward and backward, clip, check finite, update.

    `batches` are the rank's micro-batches. The loss is a sum over supervised tokens divided by
    their global count, so neither accumulation nor layout changes its weights. `stop_signal`
    rides along on the step's own reduction.
    """
    device = batches[0].tokens.device
    # int64 sums wrap around, which is what a sum of fingerprints means.
    own = (sum(b.supervised for b in batches), wrapped_sum(b.fingerprint for b in batches))
    count, fingerprint = sum_over(torch.tensor(own, dtype=torch.int64, device=device)).unbind()
    loss, load = _accumulate(model, batches, count.clamp_min(1), reduction)
    loss, load, heard = _reduce(loss, load, stop_signal)
    shards = optimizer.shards.values()
    norm = global_norm(shards, reduction.group)
    applied = bool(torch.isfinite(norm) & torch.isfinite(loss))
    if applied:
        _clip(shards, norm, rates.clip_norm)
        optimizer.step(rates.muon, rates.adamw, load.float())
    model.zero_grad(set_to_none=True)
    return StepResult(float(loss), float(norm), int(count), load, applied, heard, int(fingerprint))


def _accumulate(
    model: ZayaModel, batches: Sequence[Batch], count: Tensor, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """Gradients of all micro-batches, reduced after the last; this rank's loss and load."""
    losses, loads = [], []
    for i, batch in enumerate(batches):
        reduction.prepare(model, last=i == len(batches) - 1)
        out = model(batch.tokens, batch.labels, batch.layout)
        loss = out.loss / count
        loss.backward()
        losses.append(loss.detach())
        loads.append(out.load)
    return torch.stack(losses).sum(), torch.stack(loads).sum(dim=0)


def _reduce(loss: Tensor, load: Tensor, stop_signal: int) -> tuple[Tensor, Tensor, int]:
    """One all-reduce for everything a step reports. A sum of signals would name no signal, so each
    number has its own place."""
    signals = torch.zeros(64, dtype=torch.float64, device=loss.device)
    if stop_signal:
        signals[stop_signal] = 1
    # fp64 keeps token counts exact to 2^53.
    packed = torch.cat([loss.double().view(1), signals, load.double().flatten()])
    packed = sum_over(packed)
    heard = packed[1:65].nonzero()
    return packed[0], packed[65:].view(load.shape), int(heard.max()) if heard.numel() else 0


def global_norm(shards: Iterable[Shard], fsdp_group: ProcessGroup) -> Tensor:
    """L2 norm of the whole gradient, a fp64 scalar, with one collective.

    Local shards partition every parameter over `fsdp_group`; replicas hold equal gradients. fp64
    sums of squares make the result independent of how parameters are grouped.
    """
    squares = [shard.grad.double().square().sum() for shard in shards if shard.local.numel()]
    total = sum_over(torch.stack(squares).sum(), fsdp_group)
    return total.sqrt()


def _clip(shards: Iterable[Shard], norm: Tensor, clip_norm: float) -> None:
    if clip_norm <= 0 or float(norm) <= clip_norm:
        return
    factor = clip_norm / float(norm)
    for shard in shards:
        if shard.parameter.grad is not None:
            shard.grad.mul_(factor)
