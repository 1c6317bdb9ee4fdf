"""A rehearsal as tables, and what to change where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from zaya_train.config.check import check_all, problems
from zaya_train.config.errors import ConfigError
from zaya_train.config.kernel_rules import rehearsal_problems
from zaya_train.tools.plan import GB, MB
from zaya_train.tools.rehearsal import RESERVE, Rehearsal, micro_batches, rehearse_phases
from zaya_train.tools.rehearsal_places import COMPONENTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console

    from zaya_train.config.schema import TrainConfig


@dataclass(frozen=True)
class RehearsalRequest:
    """What to rehearse, and what it must fit."""

    config: TrainConfig
    ranks: int
    phases: tuple[str, ...] = ()
    """Names; empty for all."""
    memory_gb: float | None = None
    """Of one device, 10^9 bytes; None: nothing is refused."""
    busiest: float = 1.0
    """Tokens of each layer's first expert over an even share."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.phases or tuple(self.config.plan.phases)

    def fits(self, rehearsal: Rehearsal) -> bool:
        """Whether the peak leaves the reserve free."""
        return self.memory_gb is None or rehearsal.peak.bytes <= self.usable_bytes

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gb or 0.0) * GB * (1 - RESERVE)


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
        return replace(config, plan=plan, parallel=replace(config.parallel, **self.parallel))


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


def show_rehearsal(request: RehearsalRequest, console: Console) -> None:
    """Print memory and traffic of a step; ConfigError where a rule is broken or memory is short."""
    phases = request.config.plan.phases
    unknown = [f"plan.phases: no phase {name}" for name in request.names if name not in phases]
    on_host = rehearsal_problems(request.config.kernels, request.config.precision)
    check_all(request.config, request.ranks, [*unknown, *on_host])
    found = rehearse_phases(request.config, request.ranks, request.names, request.busiest)
    console.print(_memory(request, found))
    console.print(_traffic(found))
    console.print(_summary(request, found), highlight=False, soft_wrap=True)
    refused = [r for r in found.values() if not request.fits(r)]
    if refused:
        raise ConfigError(_refusal(request, sorted(refused, key=lambda r: -r.peak.bytes)))


def _memory(request: RehearsalRequest, found: Mapping[str, Rehearsal]) -> Table:
    title = f"peak memory of rank 0 of {request.ranks:,}, GB (10^9 bytes)"
    table = Table(title=title, title_justify="left")
    table.add_column("component")
    for name in found:
        table.add_column(name, justify="right")
    for component in COMPONENTS:
        sizes = [r.peak.components.get(component, 0) for r in found.values()]
        if max(sizes) >= MB:
            table.add_row(component, *(f"{size / GB:.2f}" for size in sizes))
    table.add_section()
    table.add_row("peak", *(f"{r.peak.bytes / GB:.2f}" for r in found.values()))
    table.add_row("reached in", *(r.peak_stage for r in found.values()))
    if request.memory_gb is not None:
        free = [request.memory_gb - r.peak.bytes / GB for r in found.values()]
        table.add_row(f"free of {request.memory_gb:g}", *(f"{gb:.1f}" for gb in free))
        shares = (f"{gb / request.memory_gb:.0%}" for gb in free)
        table.add_row(f"margin, at least {RESERVE:.0%}", *shares)
    return table


def _traffic(found: Mapping[str, Rehearsal]) -> Table:
    table = Table(title="handed to collectives by rank 0 in a step", title_justify="left")
    for column in ("phase", "collective", "axis"):
        table.add_column(column)
    table.add_column("calls", justify="right")
    table.add_column("MB", justify="right")
    for name, rehearsal in found.items():
        for (kind, axis), flow in sorted(rehearsal.flows.items()):
            size = rehearsal.layout_of(axis)
            table.add_row(name, kind, size, f"{flow.calls:,}", f"{flow.bytes / MB:,.2f}")
        table.add_section()
    return table


def _summary(request: RehearsalRequest, found: Mapping[str, Rehearsal]) -> str:
    parallel = request.config.parallel
    steps = ", ".join(f"{r.phase} {r.micro_batches} x {r.local_tokens:,}" for r in found.values())
    return (
        f"micro-batches x tokens of a rank: {steps}; recompute {parallel.recompute}, accumulation "
        f"{parallel.accumulation}; rehearsed in {max(r.seconds for r in found.values()):.0f} s"
    )


def _refusal(request: RehearsalRequest, refused: Sequence[Rehearsal]) -> str:
    """`refused` by falling peak."""
    worst, *others = refused
    said = (
        f"phase {worst.phase}: a peak of {worst.peak.bytes / GB:.1f} GB exceeds "
        f"{request.usable_bytes / GB:.1f} GB, {1 - RESERVE:.0%} of --memory-gb "
        f"{request.memory_gb:g}"
    )
    if others:
        peaks = ", ".join(f"{r.phase} ({r.peak.bytes / GB:.1f})" for r in others)
        said += f", and so does that of {peaks}"
    for cost, config, found in _tried(request, [r.phase for r in refused]):
        if all(request.fits(rehearsal) for rehearsal in found):
            peak = max(rehearsal.peak.bytes for rehearsal in found)
            return (
                f"{said}; the cheapest change that fits: {overrides(request.config, config)} "
                f"({peak / GB:.1f} GB; costs {cost})"
            )
    return f"{said}; no setting of parallel.* makes it fit: more ranks to a shard or more memory"


def _tried(
    request: RehearsalRequest, names: Sequence[str]
) -> Iterator[tuple[str, TrainConfig, list[Rehearsal]]]:
    """Changes that are valid and change something, by rising cost: cost, configuration with it,
    and phases `names` under it."""
    seen = [request.config]
    for change in CHANGES:
        config = change.applied(request.config, names)
        if any(problems(config, request.ranks)):
            continue
        if all(micro_batches(config, name, request.ranks) == 1 for name in names):
            # Nothing to add up.
            kept = request.config.parallel.accumulation
            config = replace(config, parallel=replace(config.parallel, accumulation=kept))
        if config in seen:
            continue
        seen.append(config)
        found = rehearse_phases(config, request.ranks, names, request.busiest)
        yield change.cost, config, list(found.values())


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
