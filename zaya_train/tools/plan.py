"""Preview of a run: `zaya plan recipe=... --ranks N`. Nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.table import Table

from zaya_train.config.check import check_all
from zaya_train.config.derive import context_degree, layout, layout_notes, phase_sequences
from zaya_train.model.flops import model_size, train_flops_per_token
from zaya_train.model.shapes import parameter_shapes
from zaya_train.optim.table import assign, summary
from zaya_train.phases.carry import carry_over
from zaya_train.phases.plan import steps_in
from zaya_train.planning.case import cases_of
from zaya_train.planning.checkpoint import checkpoint_bytes, host_bytes
from zaya_train.planning.components import GB, MB
from zaya_train.planning.muon import muon_plan
from zaya_train.tools.plan_memory import memory_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from zaya_train.config.schema import PhaseConfig, TrainConfig


@dataclass(frozen=True)
class PlanRequest:
    """A configuration and the number of ranks it is meant for."""

    config: TrainConfig
    ranks: int
    memory_gb: float | None = None
    """Of one device, to show what is left of it."""


def show_plan(request: PlanRequest, console: Console) -> None:
    """Print model, phases, state memory and carry-over; ConfigError with every broken rule."""
    check_all(request.config, request.ranks)
    size = model_size(request.config.model)
    console.print(
        f"model: {size.total:,} parameters, {size.embedding:,} of them embedding, "
        f"{size.active:,} active per token without it",
        highlight=False,
    )
    phases = request.config.plan.phases.values()
    console.print(phase_table(request, [_phase_column(request, phase) for phase in phases]))
    for note in layout_notes(request.config, request.ranks):
        console.print(f"note: {note}", highlight=False)
    console.print(memory_table(cases_of(request.config, request.ranks), request.memory_gb))
    console.print(_checkpoint_line(request), highlight=False)
    lines = "\n".join(_optimizer_lines(request))
    console.print(lines, highlight=False, markup=False, soft_wrap=True)
    console.print(_traffic_table(request))
    for (before_name, before), (name, after) in pairwise(as_launched(request).items()):
        console.print(edge_table(f"{before_name} -> {name}", before, after))


def as_launched(request: PlanRequest) -> dict[str, PhaseConfig]:
    """The phases with the context-parallel degrees of this launch, which may be lower."""
    parallel = request.config.parallel
    return {
        name: replace(phase, context_parallel=context_degree(phase, parallel, request.ranks))
        for name, phase in request.config.plan.phases.items()
    }


def edge_table(title: str, before: PhaseConfig, after: PhaseConfig) -> Table:
    """What is kept, reset or changed between two phases."""
    table = Table(title=title, title_justify="left")
    for column in ("item", "fate", "detail"):
        table.add_column(column)
    for row in carry_over(before, after):
        table.add_row(row.item, row.fate, row.detail)
    return table


def phase_table(request: PlanRequest, columns: Sequence[Mapping[str, str]]) -> Table:
    """A column per phase, which eighty characters hold for plans of some phases; `columns` have
    the same rows."""
    table = Table(title=f"phases on {request.ranks:,} ranks", title_justify="left")
    table.add_column("")
    for name in request.config.plan.phases:
        table.add_column(name, justify="right")
    for item in columns[0]:
        table.add_row(item, *(column[item] for column in columns))
    return table


def _phase_column(request: PlanRequest, phase: PhaseConfig) -> dict[str, str]:
    """What the table says of a phase."""
    degrees = layout(phase, request.config.parallel, request.ranks)
    unit = degrees.data * phase.micro_batch_sequences
    rows = phase.global_batch_tokens // phase.context_tokens
    # Upper end: every document as long as the context.
    flops = train_flops_per_token(request.config.model, phase.context_tokens)
    return {
        "tokens, billions": f"{phase_sequences(phase) * phase.context_tokens / 1e9:,.3f}",
        "context": f"{phase.context_tokens:,}",
        "RoPE base": f"{phase.rope_base:,.0f}",
        "steps": f"{steps_in(phase, unit):,}",
        "rows per step": f"{rows:,}",
        "micro-batches per step": f"{rows // unit:,}",
        "replicate": f"{degrees.replicate:,}",
        "shard": f"{degrees.shard:,}",
        "context ranks": f"{degrees.context:,}",
        "expert ranks": f"{degrees.expert:,}",
        "PFLOP per step, at most": f"{flops * phase.global_batch_tokens / 1e15:,.4g}",
    }


def _traffic_table(request: PlanRequest) -> Table:
    """Operands of every collective but the optimizer's; tokens spread evenly over the experts and
    none of them skipping."""
    config = request.config
    table = Table(title="handed to collectives per rank and step", title_justify="left")
    for column in ("phase", "what", "collective", "axis"):
        table.add_column(column)
    table.add_column("MB", justify="right")
    for case in cases_of(config, request.ranks):
        name, flows = case.name, case.traffic().flows()
        for flow in flows:
            if flow.bytes >= MB:
                table.add_row(name, flow.what, flow.kind, flow.axis, f"{flow.bytes / MB:,.1f}")
        rest = sum(flow.bytes for flow in flows if flow.bytes < MB)
        table.add_row(name, "everything below 1 MB", "", "", f"{rest / MB:,.1f}")
        table.add_section()
    return table


def _checkpoint_line(request: PlanRequest) -> str:
    copies = max(host_bytes(case) for case in cases_of(request.config, request.ranks))
    return (
        f"checkpoint: {checkpoint_bytes(request.config) / GB:,.2f} GB; host memory per rank for "
        f"copies while one is written: {copies / GB:,.2f} GB"
    )


def _optimizer_lines(request: PlanRequest) -> list[str]:
    """Which optimizer gets which parameter, and how evenly Muon's work falls on the ranks."""
    shapes = parameter_shapes(request.config.model)
    shards = request.config.parallel.shard or request.ranks
    own = request.config.parallel.expert_parallel
    made = muon_plan(shapes, request.ranks // shards, shards, own)
    loads = [load / 1e12 for load in made.loads.values()]
    return [
        "optimizers",
        *summary(assign(shapes), shapes),
        f"Newton-Schulz per step: {len(made.matrices):,} matrices, {sum(loads):,.4g} TFLOP; "
        f"per rank {sum(loads) / len(loads):,.4g} on average, {max(loads):,.4g} at most",
    ]
