"""Settings that save memory, by rising cost in time, and what they are called on a command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zaya_train.config.check import problems
from zaya_train.planning.case import cases_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from zaya_train.config.schema import TrainConfig


@dataclass(frozen=True)
class Change:
    """Settings that save memory, and what they cost."""

    parallel: Mapping[str, Any]
    micro_batch_sequences: int | None
    context_parallel: int | None
    """A factor."""
    cost: str

    def applied(self, config: TrainConfig, names: Sequence[str]) -> TrainConfig:
        """`config` with the change, in phases `names` where it is a phase's affair."""
        phases = dict(config.plan.phases)
        for name in names:
            phase = phases[name]
            phases[name] = replace(
                phase,
                micro_batch_sequences=self.micro_batch_sequences or phase.micro_batch_sequences,
                context_parallel=phase.context_parallel * (self.context_parallel or 1),
            )
        plan = replace(config.plan, phases=phases)
        leaner = {
            key: value
            for key, value in self.parallel.items()
            if _saves(key, getattr(config.parallel, key), value)
        }
        return replace(config, plan=plan, parallel=replace(config.parallel, **leaner))


def overrides(before: TrainConfig, after: TrainConfig) -> str:
    """What `Change.applied` changed, as words for the command line."""
    pairs: list[tuple[str, Any, Any]] = [("parallel", before.parallel, after.parallel)]
    for name, phase in after.plan.phases.items():
        pairs.append((f"plan.phases.{name}", before.plan.phases[name], phase))
    return " ".join(
        f"{group}.{key}={_yaml(value)}"
        for group, old, new in pairs
        for key, value in vars(new).items()
        if value != getattr(old, key)
    )


_BY_MEMORY: dict[str, tuple[Any, ...]] = {
    "accumulation": ("keep_unsharded", "all_reduce_last", "reduce_each"),
    "recompute": ("none", "selective", "full"),
    "reshard_after_forward": (False, True),
}
"""Values, the leanest last."""


def _saves(key: str, before: Any, after: Any) -> bool:
    values = _BY_MEMORY[key]
    return values.index(after) > values.index(before)


_LEAN = {"accumulation": "reduce_each", "reshard_after_forward": True, "recompute": "full"}
CHANGES = (
    Change({"accumulation": "all_reduce_last"}, None, None, "a reduce-scatter every micro-batch"),
    Change({"recompute": "selective"}, None, None, "norms, convolutions and router computed twice"),
    Change(
        {"accumulation": "all_reduce_last", "recompute": "selective"},
        None,
        None,
        "a reduce-scatter every micro-batch; norms, convolutions and router computed twice",
    ),
    Change({"recompute": "full"}, None, None, "every layer's forward pass computed twice"),
    Change(
        {"accumulation": "all_reduce_last", "recompute": "full"},
        None,
        None,
        "every layer's forward pass computed twice, a reduce-scatter every micro-batch",
    ),
    Change(_LEAN, None, None, "weights gathered and layers computed twice, reduced at once"),
    Change(_LEAN, 1, None, "weights gathered and layers computed twice, on smaller products"),
    Change(_LEAN, 1, 2, "weights gathered and layers computed twice, twice the ranks to a row"),
    Change(
        _LEAN, 1, 4, "weights gathered and layers computed twice, four times the ranks to a row"
    ),
)
"""By rising cost in time."""


def changed(
    config: TrainConfig, ranks: int, names: Sequence[str]
) -> Iterator[tuple[str, TrainConfig]]:
    """Changes that are valid and change something, by rising cost: the cost, and `config` with it,
    in phases `names` where it is a phase's affair."""
    seen = [config]
    for change in CHANGES:
        other = change.applied(config, names)
        if any(problems(other, ranks)):
            continue
        if all(case.micro_batches == 1 for case in cases_of(other, ranks, names)):
            # Nothing to add up.
            kept = config.parallel.accumulation
            other = replace(other, parallel=replace(other.parallel, accumulation=kept))
        if other not in seen:
            seen.append(other)
            yield change.cost, other


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
