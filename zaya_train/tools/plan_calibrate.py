"""`zaya plan --calibrate`: seconds of the trainer's own steps on this machine, for forecasts.

Steps of few shapes, none of them a phase's, on as many local ranks as the launch has: random rows
of equal documents, real model, exchange and optimizers. Several rounds over all shapes, the median
of each: another job's burst then falls on all alike.
"""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from zaya_train.config.derive import layout
from zaya_train.config.errors import ConfigError
from zaya_train.parallel.apply import chunking_of
from zaya_train.parallel.fsdp import Reduction
from zaya_train.parallel.mesh import Mesh
from zaya_train.planning.calibration import PARTS, Calibration, features
from zaya_train.planning.case import Case
from zaya_train.runtime.device import describe, usable_cores
from zaya_train.tools.bench_step import documents_of
from zaya_train.tools.doctor_ranks import on_ranks
from zaya_train.tools.random_rows import random_row
from zaya_train.train.batch import make_batch
from zaya_train.train.built import build_phase
from zaya_train.train.step import Rates, train_step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zaya_train.config.schema import TrainConfig

CPU = torch.device("cpu")
ROUNDS, WARM_ROUNDS, STEPS = 5, 1, 2
_TOKENS = 1024


@dataclass(frozen=True)
class Probe:
    """Steps of one shape."""

    row_tokens: int
    rows: int
    document_tokens: int
    micro_batches: int = 1
    shared: bool = False
    """Two ranks to a row."""


PROBES = (
    Probe(_TOKENS // 8, 2, _TOKENS // 8),
    Probe(_TOKENS // 8, 8, _TOKENS // 8),
    Probe(_TOKENS // 8, 4, _TOKENS // 8, micro_batches=3),
    Probe(2 * _TOKENS, 1, _TOKENS // 8),
    Probe(2 * _TOKENS, 1, 2 * _TOKENS),
    Probe(2 * _TOKENS, 1, _TOKENS // 8, shared=True),
    Probe(2 * _TOKENS, 2, _TOKENS, shared=True),
)


def calibrate(config: TrainConfig, ranks: int) -> Calibration:
    """Measure and fit. ConfigError where there are more ranks than cores."""
    if ranks > usable_cores():
        raise ConfigError(
            f"--calibrate with --ranks {ranks}: this machine has {usable_cores()} cores; ranks "
            "that share a core would be measured as slow"
        )
    probes = [probe for probe in PROBES if ranks % 2 == 0 or not probe.shared]
    cases = [case_of(config, probe, ranks) for probe in probes]
    found = on_ranks(_measure, ranks, cases, [probe.document_tokens for probe in probes])
    # A step ends on all ranks together: the slowest says when.
    seconds = [max(rank[i] for rank in found) for i in range(len(probes))]
    return fit(cases, probes, seconds, describe(CPU).name)


def case_of(config: TrainConfig, probe: Probe, ranks: int) -> Case:
    """`probe` as a phase of the configuration."""
    name = next(iter(config.plan.phases))
    shared = 2 if probe.shared else 1
    phase = replace(
        config.plan.phases[name],
        context_tokens=probe.row_tokens,
        micro_batch_sequences=probe.rows,
        context_parallel=shared,
        global_batch_tokens=probe.row_tokens * probe.rows * probe.micro_batches * ranks // shared,
        batch_ramp=None,
    )
    plan = replace(config.plan, phases={name: phase})
    return Case(replace(config, plan=plan), name, ranks)


def fit(
    cases: Sequence[Case], probes: Sequence[Probe], seconds: Sequence[float], device: str
) -> Calibration:
    """Least squares of relative errors; parts that would be negative are left out, the most
    negative first."""
    counts = np.array(
        [features(case, probe.document_tokens) for case, probe in zip(cases, probes, strict=True)]
    )
    measured = np.array(seconds)
    parts = [i for i in range(len(PARTS)) if counts[:, i].any()]
    while True:
        scaled = counts[:, parts] / measured[:, None]
        each = np.linalg.lstsq(scaled / scaled.max(axis=0), np.ones(len(measured)), rcond=None)[0]
        each = each / scaled.max(axis=0)
        if (each >= 0).all():
            break
        parts.pop(int(np.argmin(each * counts[:, parts].mean(axis=0))))
    found = dict.fromkeys(PARTS, 0.0)
    found |= {PARTS[i]: float(value) for i, value in zip(parts, each, strict=True)}
    errors = np.abs(counts[:, parts] @ each / measured - 1)
    return Calibration(
        device=device, ranks=cases[0].ranks, largest_error=float(errors.max()), **found
    )


def _measure(cases: Sequence[Case], documents: Sequence[int]) -> list[float]:
    """Median seconds of a step of each case, on this rank."""
    # torch deprecates names that FSDP itself calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    steps = [_steps(case, tokens) for case, tokens in zip(cases, documents, strict=True)]
    times: list[list[float]] = [[] for _ in cases]
    for number in range(WARM_ROUNDS + ROUNDS):
        for step, seconds in zip(steps, times, strict=True):
            for _ in range(STEPS):
                started = time.perf_counter()
                step()
                if number >= WARM_ROUNDS:
                    seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


def _steps(case: Case, document_tokens: int) -> Callable[[], object]:
    """One training step of `case`, to be called again and again."""
    config, phase = case.config, case.phase
    mesh = Mesh.build(layout(phase, config.parallel, case.ranks), "cpu")
    built = build_phase(config, (case.name, phase), mesh, CPU)
    documents = documents_of(phase.context_tokens, document_tokens)
    chunking, vocabulary = chunking_of(mesh, config), config.model.vocab_size
    batches = [
        make_batch(
            [
                random_row(
                    mesh.data_rank + 97 * (i + 31 * k), documents, phase.context_tokens, vocabulary
                )
                for i in range(phase.micro_batch_sequences)
            ],
            chunking,
            mesh.context_rank,
            CPU,
        )
        for k in range(case.micro_batches)
    ]
    rates = Rates(1e-4, 1e-4, config.optim.clip_norm, z_loss=config.optim.z_loss)
    reduction = Reduction.of(mesh, config.parallel)
    return lambda: train_step(built.model, built.optimizer, batches, rates, reduction)
