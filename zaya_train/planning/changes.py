"""Settings that save memory, and what they are called on a command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from zaya_train.config.check import problems
from zaya_train.planning.case import cases_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zaya_train.config.schema import ParallelConfig, TrainConfig

_BY_MEMORY: dict[str, tuple[Any, ...]] = {
    "accumulation": ("keep_unsharded", "all_reduce_last", "reduce_each"),
    "recompute": ("none", "selective", "full"),
    "reshard_after_forward": (False, True),
}
"""Values, the leanest last."""
_SHARDS = (2, 4)
"""Ranks of a shard group, in those configured."""


@dataclass(frozen=True)
class Reach:
    """What a change may touch besides these settings of `parallel`."""

    rows: int | None = None
    """To a micro-batch; None: as configured."""
    context: int = 1
    """Ranks to a row, in those configured."""
    experts: int = 1
    """Ranks among which experts are divided, at least."""


REACHES = (
    Reach(),
    Reach(rows=1),
    Reach(rows=1, context=2),
    Reach(rows=1, context=4),
    # Last: that tokens fall evenly on the experts is a guess.
    Reach(rows=1, experts=8),
    Reach(rows=1, context=4, experts=8),
)
"""The nearest first."""


def leaner(config: TrainConfig, ranks: int, names: Sequence[str]) -> Iterator[list[TrainConfig]]:
    """Valid configurations that save memory against `config`, for each of `REACHES`: rows and
    context ranks are those of phases `names`, settings of `parallel` every phase's."""
    seen = [config]
    for reach in REACHES:
        found = []
        for parallel in _settings(config.parallel, reach, config.model.num_experts):
            other = _reached(replace(config, parallel=parallel), names, reach)
            if any(problems(other, ranks)):
                continue
            if all(case.micro_batches == 1 for case in cases_of(other, ranks, names)):
                # Nothing to add up.
                kept = replace(parallel, accumulation=config.parallel.accumulation)
                other = replace(other, parallel=kept)
            if other not in seen:
                seen.append(other)
                found.append(other)
        yield found


def _settings(own: ParallelConfig, reach: Reach, experts: int) -> Iterator[ParallelConfig]:
    """As lean as configured, or leaner."""
    kept = [values[values.index(getattr(own, key)) :] for key, values in _BY_MEMORY.items()]
    # Beyond as many ranks as there are experts, shards are padding. All ranks cannot be more.
    shards = [own.shard, *(n * own.shard for n in _SHARDS if 0 < n * own.shard <= experts)]
    for shard, *values in product(shards, *kept):
        chosen = dict(zip(_BY_MEMORY, values, strict=True))
        degree = max(own.expert_parallel, reach.experts)
        yield replace(own, shard=shard, expert_parallel=degree, **chosen)


def _reached(config: TrainConfig, names: Sequence[str], reach: Reach) -> TrainConfig:
    """`config` with the rows and context ranks of `reach` in phases `names`."""
    phases = dict(config.plan.phases)
    for name in names:
        phase = phases[name]
        phases[name] = replace(
            phase,
            micro_batch_sequences=reach.rows or phase.micro_batch_sequences,
            context_parallel=phase.context_parallel * reach.context,
        )
    return replace(config, plan=replace(config.plan, phases=phases))


def overrides(before: TrainConfig, after: TrainConfig) -> list[str]:
    """What differs in `parallel` and phases, as words for the command line."""
    pairs: list[tuple[str, Any, Any]] = [("parallel", before.parallel, after.parallel)]
    for name, phase in after.plan.phases.items():
        pairs.append((f"plan.phases.{name}", before.plan.phases[name], phase))
    return [
        f"{group}.{key}={_yaml(value)}"
        for group, old, new in pairs
        for key, value in vars(new).items()
        if value != getattr(old, key)
    ]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
