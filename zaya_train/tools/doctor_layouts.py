"""The layout certificate: layouts of ranks that train as one process does, tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from zaya_train.optim.optimizer import Optimizer
from zaya_train.tools.doctor_ranks import RanksFailed, on_ranks
from zaya_train.tools.doctor_subject import Context, Subject, Trial
from zaya_train.train.step import Rates, train_step

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_train.config.schema import TrainConfig

STEPS = 2
TOLERANCE = 1e-5
"""Relative, fp32; rounding in other orders stays below a tenth of it."""
_RATES = Rates(muon=0.02, adamw=0.01, clip_norm=2.0)
SERIAL = Trial("one process")

Tensors = dict[str, "Tensor"]


@dataclass
class Outcome:
    """What one rank saw of a trial; whole tensors."""

    losses: list[float]
    norms: list[float]
    gradients: list[Tensors]
    """Of every step, clipped."""
    weights: Tensors
    biases: Tensors


@dataclass(frozen=True)
class Verdict:
    """A trial against one process: largest relative errors, and what they belong to."""

    trial: Trial
    context: Context
    errors: dict[str, float]
    """loss, gradients, weights, biases."""
    worst: str
    """Tensor with the largest error, or why there is nothing to compare."""

    @property
    def words(self) -> str:
        rows = self.context.row_tokens
        return f"layout {self.trial.name} ({self.trial.words()}), rows of {rows}: {self.worst}"

    @property
    def tried(self) -> bool:
        return not self.trial.impossible

    @property
    def ok(self) -> bool:
        # NaN fails every comparison.
        return bool(self.errors) and all(e <= TOLERANCE for e in self.errors.values())


class _Recording(Optimizer):
    """Keeps the gradients every step sees."""

    gradients: list[Tensors]

    def step(self, muon_rate: float, adamw_rate: float, load: Tensor) -> None:
        """See Optimizer."""
        named = ((n, s.parameter.grad) for n, s in self.shards.items())
        self.gradients.append({n: _whole(g) for n, g in named if g is not None})
        super().step(muon_rate, adamw_rate, load)


def trials_of(config: TrainConfig, context: Context, ranks: int) -> list[Trial]:
    """Layouts of `ranks` ranks that the configuration allows, and the user's own, possible or not;
    `config` is shrunk."""
    half = max(1, ranks // 2)
    if context.degree == 1:
        found = [
            Trial("replicas and shards", ranks // half, half, micro_rows=1),
            Trial("shards, freed after forward", 1, ranks, micro_rows=1, reshard=True),
            Trial("experts over 2", 1, ranks, expert=2, micro_rows=1),
            Trial(f"experts over {ranks}", 1, ranks, expert=ranks, micro_rows=2),
            Trial("recompute selective", ranks // half, half, micro_rows=1, recompute="selective"),
            Trial("recompute full", ranks // half, half, micro_rows=1, recompute="full"),
        ]
        found += [
            Trial(f"accumulation {mode}", ranks // half, half, micro_rows=1, accumulation=mode)
            for mode in ("all_reduce_last", "reduce_each")
        ]
    else:
        degrees = sorted({2, min(ranks, context.degree)})
        found = [Trial(f"context over {n}", 1, ranks // n, n, micro_rows=1) for n in degrees]
        most = degrees[-1]
        name = f"context over {most}, experts over 2, recompute full"
        found.append(Trial(name, 1, ranks // most, most, 2, 1, "full"))
    possible = [trial for trial in found if not _obstacle(trial, config, context)]
    return [*possible, _own(config, context, ranks)]


def _own(config: TrainConfig, context: Context, ranks: int) -> Trial:
    """The user's settings, degrees as far as `ranks` allow."""
    parallel = config.parallel
    group = math.gcd(parallel.shard, ranks)
    shared = min(group, context.degree)
    own = Trial(
        "your settings",
        replicate=ranks // group,
        shard=group // shared,
        context=shared,
        expert=min(group, parallel.expert_parallel),
        micro_rows=1,
        recompute=parallel.recompute,
        accumulation=parallel.accumulation,
        reshard=parallel.reshard_after_forward,
    )
    if group % shared:
        why = f"context over {shared} does not divide a group of {group} of {ranks} ranks"
        return replace(own, impossible=why)
    return replace(own, impossible=_obstacle(own, config, context))


def _obstacle(trial: Trial, config: TrainConfig, context: Context) -> str:
    """Why a trial is not possible, or nothing."""
    experts, group = config.model.num_experts, trial.layout.fsdp
    chunks = trial.context * (2 if config.parallel.context_chunks == "head_tail" else 1)
    reach = config.model.conv_depthwise_taps + config.model.conv_grouped_taps - 2
    if trial.context > 1 and context.row_tokens // chunks < max(1, reach):
        return (
            f"{context.row_tokens} tokens in {chunks} chunks are fewer each than the {reach} that "
            "the convolutions reach back"
        )
    if experts % trial.expert or group % trial.expert:
        return f"{trial.expert} does not divide {experts} experts and a group of {group} ranks"
    return ""


def certify(config: TrainConfig, context: Context, trials: list[Trial]) -> list[Verdict]:
    """Every trial against one process; `config` is shrunk."""
    verdicts = [Verdict(t, context, {}, t.impossible) for t in trials if t.impossible]
    possible = [trial for trial in trials if not trial.impossible]
    reference: Outcome = on_ranks(_trained, 1, config, context, [SERIAL])[0][0]
    for world in sorted({trial.layout.world for trial in possible}):
        members = [trial for trial in possible if trial.layout.world == world]
        verdicts += _compared(config, context, members, reference)
    return verdicts


def _compared(
    config: TrainConfig, context: Context, trials: list[Trial], reference: Outcome
) -> list[Verdict]:
    """Together in one set of processes; one by one where that fails, to name the one that does."""
    try:
        ranks = on_ranks(_trained, trials[0].layout.world, config, context, trials)
    except RanksFailed as failure:
        if len(trials) == 1:
            return [Verdict(trials[0], context, {}, str(failure))]
        return [v for t in trials for v in _compared(config, context, [t], reference)]
    return [
        _verdict(trial, context, [rank[i] for rank in ranks], reference)
        for i, trial in enumerate(trials)
    ]


def _trained(config: TrainConfig, context: Context, trials: list[Trial]) -> list[Outcome]:
    """On every rank: a few steps of every trial."""
    outcomes = []
    for trial in trials:
        outcomes.append(_steps(Subject.of(config, context, trial)))
        dist.barrier()
    return outcomes


def _steps(subject: Subject) -> Outcome:
    optimizer = subject.optimizer(_Recording)
    assert isinstance(optimizer, _Recording)
    optimizer.gradients = []
    rates = replace(_RATES, z_loss=subject.config.optim.z_loss)
    results = [
        train_step(subject.model, optimizer, subject.batches(number), rates, subject.reduction)
        for number in range(STEPS)
    ]
    return Outcome(
        losses=[r.loss for r in results],
        norms=[r.grad_norm for r in results],
        gradients=optimizer.gradients,
        weights={n: _whole(s.parameter) for n, s in optimizer.shards.items()},
        biases={n: _whole(b) for n, b in subject.model.named_buffers()},
    )


def _whole(tensor: Tensor) -> Tensor:
    """A copy of the full tensor. Collective for DTensors."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, fp64."""
    gap = (found.double() - expected.double()).norm()
    return float(gap / expected.double().norm().clamp_min(1e-30))


def _verdict(trial: Trial, context: Context, ranks: list[Outcome], expected: Outcome) -> Verdict:
    """The largest error over ranks, steps and tensors."""
    errors: dict[str, dict[str, float]] = {
        "loss": {}, "gradients": {}, "weights": {}, "biases": {},
    }  # fmt: skip
    for rank, found in enumerate(ranks):
        for step in range(STEPS):
            for word, a, b in (
                ("loss", found.losses, expected.losses),
                ("gradient norm", found.norms, expected.norms),
            ):
                pair = torch.tensor(a[step]), torch.tensor(b[step])
                errors["loss"][f"{word} of step {step} on rank {rank}"] = relative(*pair)
            _compare(errors["gradients"], found.gradients[step], expected.gradients[step], step)
        _compare(errors["weights"], found.weights, expected.weights, STEPS)
        _compare(errors["biases"], found.biases, expected.biases, STEPS)
    largest = {kind: max(of.values()) for kind, of in errors.items()}
    kind = max(largest, key=lambda kind: _rank_of(largest[kind]))
    tensor = max(errors[kind], key=lambda name: _rank_of(errors[kind][name]))
    return Verdict(trial, context, largest, f"{kind}: {tensor}")


def _rank_of(error: float) -> float:
    return error if error == error else float("inf")


def _compare(errors: dict[str, float], found: Tensors, expected: Tensors, step: int) -> None:
    for name in found.keys() | expected.keys():
        key = f"{name} after {step} steps"
        both = name in found and name in expected
        error = relative(found[name], expected[name]) if both else float("inf")
        errors[key] = max(errors.get(key, 0.0), _rank_of(error))


def figures(verdict: Verdict) -> dict[str, Any]:
    """For the receipt."""
    return {
        "trial": verdict.trial.name,
        "layout": verdict.trial.words(),
        "row_tokens": verdict.context.row_tokens,
        "phases": list(verdict.context.phases),
        "errors": verdict.errors,
        "worst": verdict.worst,
        "tried": verdict.tried,
        "ok": verdict.ok,
    }
