"""`zaya plan phases recipe=... --ranks N`: the chain of phases, edge by edge."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from zaya_train.config.check import check_all
from zaya_train.config.derive import layout, layout_notes, phase_sequences
from zaya_train.phases.carry import entry_checks
from zaya_train.phases.gates import conditions
from zaya_train.phases.plan import schedule_factor, steps_in
from zaya_train.planning.case import cases_of
from zaya_train.planning.components import GB
from zaya_train.planning.memory import forecast
from zaya_train.tools.plan import as_launched, edge_table, phase_table

if TYPE_CHECKING:
    from rich.console import Console

    from zaya_train.config.schema import PhaseConfig
    from zaya_train.tools.plan import PlanRequest


def show_phases(request: PlanRequest, console: Console) -> None:
    """Print what every phase is and what passes from each to the next.

    Raises:
        ConfigError: with every broken rule.
    """
    check_all(request.config, request.ranks)
    phases = request.config.plan.phases
    ends = accumulate(phase_sequences(p) * p.context_tokens for p in phases.values())
    pairs = zip(phases.values(), ends, strict=True)
    console.print(phase_table(request, [_column(request, phase, end) for phase, end in pairs]))
    peak = max(forecast(case).peak.bytes for case in cases_of(request.config, request.ranks)) / GB
    console.print(f"peak memory of rank 0, at most: {peak:.2f} GB", highlight=False)
    for note in layout_notes(request.config, request.ranks):
        console.print(f"note: {note}", highlight=False)
    start = request.config.checkpoint.branch_from or request.config.checkpoint.initial_weights
    console.print(f"starts from: {start or 'a fresh initialisation'}", highlight=False)
    for (before_name, before), (name, after) in pairwise(as_launched(request).items()):
        console.print(edge_table(f"{before_name} -> {name}", before, after))
        for line in entry_checks(before_name, before, name):
            console.print(f"  entry check: {line}", highlight=False, soft_wrap=True)
    name, last = list(phases.items())[-1]
    for line in conditions(last.exit_gate):
        console.print(f"  {name} is done if: {line}", highlight=False)


def _column(request: PlanRequest, phase: PhaseConfig, end_tokens: int) -> dict[str, str]:
    degrees = layout(phase, request.config.parallel, request.ranks)
    rows = phase_sequences(phase)
    total = rows * phase.context_tokens
    last = schedule_factor(phase.schedule, total, total) * phase.learning_rate_scale
    return {
        "tokens": _short(total),
        "tokens at its end": _short(end_tokens),
        "steps": f"{steps_in(phase, degrees.data * phase.micro_batch_sequences):,}",
        "context": f"{phase.context_tokens:,}",
        "RoPE base": f"{phase.rope_base:,.0f}",
        "batch tokens": f"{phase.global_batch_tokens:,}",
        "replica, shard, CP": f"{degrees.replicate} x {degrees.shard} x {degrees.context}",
        "expert ranks": str(degrees.expert),
        "LR, of its peak": f"{phase.learning_rate_scale:g} -> {last:g}",
        "schedule": phase.schedule.kind,
        "loss on": phase.loss_on,
        "exit gate": "; ".join(conditions(phase.exit_gate)) or "none",
    }


def _short(tokens: int) -> str:
    """Exact below 10^9; four phases of an 8B run have to fit eighty characters."""
    for unit, name in ((10**12, "T"), (10**9, "G")):
        if tokens >= unit:
            return f"{tokens / unit:.5g} {name}"
    return f"{tokens:,}"
