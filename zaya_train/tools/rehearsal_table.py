"""A rehearsal as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from zaya_train.config.check import check_all
from zaya_train.config.kernel_rules import rehearsal_problems
from zaya_train.planning.components import COMPONENTS, GB, MB, RESERVE
from zaya_train.planning.fitting import Budget, verdict
from zaya_train.tools.rehearsal import Rehearsal, rehearse_phases

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    memory_source: str = ""
    """Who says so; nothing: --memory-gb."""
    busiest: float = 1.0
    """Tokens of each layer's first expert over an even share."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.phases or tuple(self.config.plan.phases)


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
    if request.memory_gb is not None:
        source = request.memory_source or f"--memory-gb {request.memory_gb:g}"
        budget = Budget(request.memory_gb, source)
        peaks = {name: rehearsal.peak.bytes for name, rehearsal in found.items()}
        said = verdict(request.config, request.ranks, peaks, budget)
        console.print(said, markup=False, highlight=False, soft_wrap=True)


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
