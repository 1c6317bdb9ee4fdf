"""Layouts of a launch by forecast time, among those that fit: `zaya plan --search`.

Tried for the whole run: shard groups of one, two and four nodes, expert ranks, recompute,
reshard_after_forward, and whether micro-batches reduce. For every phase then: one, two and four
rows to a micro-batch, and its context ranks, half and twice as many. Rules are `config.check`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from zaya_train.config.check import problems
from zaya_train.planning.case import Case
from zaya_train.planning.memory import forecast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zaya_train.config.schema import (
        AccumulationKind,
        ParallelConfig,
        RecomputeKind,
        TrainConfig,
    )
    from zaya_train.planning.fitting import Budget

    Seconds = Callable[[Case], float]

_ROWS = (1, 2, 4)
_NODES = (1, 2, 4)
"""Of a shard group; a launch smaller than a node is one."""
_EXPERTS = (1, 2, 8)


@dataclass(frozen=True)
class Found:
    """A layout of the whole plan that fits in every phase."""

    config: TrainConfig
    seconds: float
    """Of the whole plan: steps of all phases."""
    peak_bytes: int
    """Of the fullest phase."""


@dataclass(frozen=True)
class Searched:
    """What there is."""

    best: tuple[Found, ...]
    """Fastest first."""
    tried: int
    refused: dict[str, int]
    """Why others are out -> how many."""


def search(
    config: TrainConfig, machine: tuple[int, int], budget: Budget, seconds_of: Seconds
) -> Searched:
    """Every valid layout judged. machine: ranks of the launch and of a node; `seconds_of`: a full
    step of a case."""
    ranks, node_ranks = machine
    found, refused, tried = [], Counter[str](), 0
    for parallel in _settings(config, ranks, node_ranks):
        tried += 1
        layout, why = _fastest(replace(config, parallel=parallel), ranks, budget, seconds_of)
        if layout is None:
            refused[why] += 1
        else:
            found.append(layout)
    found.sort(key=lambda one: one.seconds)
    return Searched(tuple(found), tried, dict(refused.most_common()))


def _settings(config: TrainConfig, ranks: int, node_ranks: int) -> Iterator[ParallelConfig]:
    """Of the whole run."""
    nodes = [n * node_ranks for n in _NODES if ranks % (n * node_ranks) == 0]
    shards = sorted({min(node_ranks, ranks), *nodes})
    experts = [n for n in _EXPERTS if config.model.num_experts % n == 0]
    kinds: tuple[AccumulationKind, ...] = ("keep_unsharded", "all_reduce_last")
    remade: tuple[RecomputeKind, ...] = ("none", "selective", "full")
    for shard, expert, recompute, reshard, accumulation in product(
        shards, experts, remade, (False, True), kinds
    ):
        if shard % expert == 0:
            yield replace(
                config.parallel,
                shard=shard,
                expert_parallel=expert,
                recompute=recompute,
                reshard_after_forward=reshard,
                accumulation=accumulation,
                context_parallel_fit=False,
                context_parallel_limit=0,
            )


def _fastest(
    config: TrainConfig, ranks: int, budget: Budget, seconds_of: Seconds
) -> tuple[Found | None, str]:
    """The fastest rows and context ranks of every phase that fit, or why there are none."""
    phases, seconds, peak = dict(config.plan.phases), 0.0, 0
    judged: dict[tuple[int, ...], _Judged] = {}
    for name, phase in config.plan.phases.items():
        shape = (phase.context_tokens, phase.global_batch_tokens, phase.context_parallel)
        if shape not in judged:
            judged[shape] = _phase(Case(config, name, ranks), budget, seconds_of)
        one = judged[shape]
        if one.why:
            return None, f"phase {name}: {one.why}"
        phases[name] = replace(phase, context_parallel=one.context, micro_batch_sequences=one.rows)
        seconds += one.seconds * phase.tokens / phase.global_batch_tokens
        peak = max(peak, one.peak_bytes)
    return Found(replace(config, plan=replace(config.plan, phases=phases)), seconds, peak), ""


@dataclass(frozen=True)
class _Judged:
    """A phase under one setting of the run."""

    why: str
    """Nothing where it fits."""
    seconds: float = math.inf
    """Of a step."""
    peak_bytes: int = 0
    context: int = 0
    rows: int = 0


def _phase(case: Case, budget: Budget, seconds_of: Seconds) -> _Judged:
    """The fastest that fits."""
    own, phase = case.phase.context_parallel, case.phase
    best = _Judged("no such context ranks and rows divide")
    for context, rows in product(sorted({max(1, own // 2), own, 2 * own}), _ROWS):
        other = replace(phase, context_parallel=context, micro_batch_sequences=rows)
        plan = replace(case.config.plan, phases={case.name: other})
        tried = replace(case, config=replace(case.config, plan=plan))
        if any(problems(tried.config, case.ranks)):
            continue
        peak = forecast(tried).peak.bytes
        if peak > budget.usable_bytes:
            if best.why:
                best = _Judged("more memory than a device has")
            continue
        seconds = seconds_of(tried)
        if seconds < best.seconds:
            best = _Judged("", seconds, peak, context, rows)
    return best
