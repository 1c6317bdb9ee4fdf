"""Preview of a run: `zaya plan recipe=... --ranks N`. Nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from zaya_train.config.check import check_all
from zaya_train.config.derive import layout, layout_notes, phase_sequences
from zaya_train.model.flops import model_size, train_flops_per_token
from zaya_train.model.zaya import ZayaModel
from zaya_train.optim.owners import matrices_of, plan
from zaya_train.optim.table import assign, summary
from zaya_train.parallel.collectives import row_counts
from zaya_train.parallel.traffic import Traffic, Work
from zaya_train.phases.carry import carry_over
from zaya_train.phases.plan import steps_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from zaya_train.config.schema import ModelConfig, PhaseConfig, TrainConfig
    from zaya_train.optim.owners import Plan

GB, MB = 10**9, 10**6
_FP32_BYTES, _BF16_BYTES = 4, 2


@dataclass(frozen=True)
class PlanRequest:
    """A configuration and the number of ranks it is meant for."""

    config: TrainConfig
    ranks: int


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
    console.print(_memory_table(request))
    lines = "\n".join(_optimizer_lines(request))
    console.print(lines, highlight=False, markup=False, soft_wrap=True)
    console.print(_traffic_table(request))
    for (before_name, before), (name, after) in pairwise(request.config.plan.phases.items()):
        console.print(edge_table(f"{before_name} -> {name}", before, after))


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
    for name, phase in config.plan.phases.items():
        degrees = layout(phase, config.parallel, request.ranks)
        rows, length = phase.micro_batch_sequences, phase.context_tokens
        micro = phase.global_batch_tokens // length // (degrees.data * rows)
        tokens = config.model.num_layers * micro * rows * length // degrees.context
        work = Work(micro, rows, length, tokens, tokens)
        traffic = Traffic(config.model, config.parallel, config.precision, degrees, work)
        flows = traffic.flows()
        for flow in flows:
            if flow.bytes >= MB:
                table.add_row(name, flow.what, flow.kind, flow.axis, f"{flow.bytes / MB:,.1f}")
        rest = sum(flow.bytes for flow in flows if flow.bytes < MB)
        table.add_row(name, "everything below 1 MB", "", "", f"{rest / MB:,.1f}")
        table.add_section()
    return table


def state_bytes(config: TrainConfig, world: int) -> dict[str, float]:
    """Bytes per rank of what lives from step to step; activations are not in it.

    Muon keeps one momentum per matrix element, AdamW two fp32 moments; matrices are everything but
    the embedding here, whose moments dominate AdamW's (vectors are under 0.1 %).
    """
    size, fsdp_ranks = model_size(config.model), config.parallel.shard or world
    matrices = size.total - size.embedding
    accumulates = any(
        phase.global_batch_tokens // phase.context_tokens
        > layout(phase, config.parallel, world).data * phase.micro_batch_sequences
        for phase in config.plan.phases.values()
    )
    momentum = _BF16_BYTES if config.optim.muon.momentum_dtype == "bf16" else _FP32_BYTES
    # Of the experts a rank gathers, and sums gradients of, only those it computes.
    own = config.parallel.expert_parallel
    computed = size.total - size.experts * (own - 1) // own
    held = {
        "keep_unsharded": float(computed * _FP32_BYTES),
        "all_reduce_last": size.total * _FP32_BYTES / fsdp_ranks,
        "reduce_each": 0.0,
    }[config.parallel.accumulation]
    gathered = _BF16_BYTES if config.precision.compute_dtype == "bf16" else _FP32_BYTES
    return {
        "fp32 master weights": size.total * _FP32_BYTES / fsdp_ranks,
        "fp32 gradients": size.total * _FP32_BYTES / fsdp_ranks,
        "Muon momentum": matrices * momentum / fsdp_ranks,
        "AdamW moments": 2 * size.embedding * _FP32_BYTES / fsdp_ranks,
        "fp32 gradients while accumulating": held if accumulates else 0.0,
        "gathered weights": (
            0.0 if config.parallel.reshard_after_forward else float(computed * gathered)
        ),
    }


SAVED = ("fp32 master weights", "Muon momentum", "AdamW moments")
"""What of the state is in a checkpoint."""


def _memory_table(request: PlanRequest) -> Table:
    group = request.config.parallel.shard or request.ranks
    table = Table(title=f"state per rank, sharded over {group} ranks", title_justify="left")
    table.add_column("component")
    table.add_column("GB", justify="right")
    parts = state_bytes(request.config, request.ranks)
    for name, count in parts.items():
        table.add_row(name, f"{count / GB:.2f}")
    table.add_section()
    table.add_row("sum, activations not included", f"{sum(parts.values()) / GB:.2f}")
    copies = sum(parts[name] for name in SAVED) if request.config.checkpoint.asynchronous else 0.0
    table.add_row("host memory, copies for background saves", f"{copies / GB:.2f}")
    return table


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


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter, by name."""
    with torch.device("meta"):
        model = ZayaModel(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def muon_plan(
    shapes: Mapping[str, tuple[int, ...]], replicas: int, shards: int, expert: int = 1
) -> Plan:
    """Muon's plan where stacks are sharded between matrices, experts over `expert` ranks first."""
    table = assign(shapes)
    muon = [shape for name, shape in shapes.items() if table[name].optimizer == "muon"]
    places = matrices_of(muon, stacks_held(shapes, shards, expert))
    return plan([place.matrix for place in places], replicas, shards)


def stacks_held(shapes: Mapping[str, tuple[int, ...]], shards: int, expert: int) -> list[list[int]]:
    """[column][parameter of Muon's]: matrices of each stack on a column; 0 where the parameter is
    one matrix."""
    table = assign(shapes)
    counts = []
    for name, shape in shapes.items():
        view = table[name].view
        if view is not None:
            own = expert if table[name].what == "experts" else 1
            counts.append(matrices_held(shape[0], shards, own) if view.is_stack else [0] * shards)
    return [[count[column] for count in counts] for column in range(shards)]


def matrices_held(count: int, shards: int, expert: int) -> list[int]:
    """Of a stack of `count`, by column: divided over `expert` neighbours, then in chunks over the
    ranks that hold the same part (`parallel.mesh`)."""
    chunks = row_counts(count // expert, shards // expert)
    return [chunks[column // expert] for column in range(shards)]
