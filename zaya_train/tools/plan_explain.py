"""Where figures come from (`zaya plan --explain`), and found layouts as a table (`--search`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from zaya_train.planning.activations import entry_parts, kept_parts
from zaya_train.planning.changes import overrides
from zaya_train.planning.components import GB, MB
from zaya_train.planning.memory import forecast
from zaya_train.tools.plan_time import DAY_SECONDS

if TYPE_CHECKING:
    from rich.console import Console

    from zaya_train.config.schema import TrainConfig
    from zaya_train.planning.case import Case
    from zaya_train.planning.search import Searched
    from zaya_train.tools.plan_time import Clock

SHOWN = 10
"""Layouts of a search."""


def explain(case: Case, clock: Clock | None, console: Console) -> None:
    """Every part of one phase's forecast with its formula, and the biggest of memory and time."""
    found = forecast(case)
    console.print(f"\n{case.name}: {_numbers(case)}", highlight=False, soft_wrap=True)
    table = Table(title=f"{case.name}: kept for the backward pass", title_justify="left")
    for column in ("part", "bytes", "MB"):
        table.add_column(column, justify="right" if column == "MB" else "left")
    layers = case.model.num_layers
    for part in entry_parts(case):
        table.add_row(part.name, part.formula, f"{part.bytes / MB:,.1f}")
    for part in kept_parts(case, case.parallel.recompute):
        if part.bytes:
            words = f"{layers} x {part.formula}"
            table.add_row(part.name, words, f"{layers * part.bytes / MB:,.1f}")
    console.print(table)
    for moment in sorted(found.moments, key=lambda moment: -moment.bytes):
        console.print(f"  {moment.name}: {moment.bytes / GB:.3f} GB", highlight=False)
    name, size = max(found.peak.components.items(), key=lambda item: item[1])
    share = size / found.peak.bytes
    console.print(f"most of the memory: {name}, {size / GB:.2f} GB, {share:.0%}", highlight=False)
    if clock is not None:
        _explain_time(case, clock, console)


def _numbers(case: Case) -> str:
    """What the formulas' letters stand for."""
    m, degrees = case.model, case.layout
    return (
        f"T {case.tokens:,} tokens of a rank's micro-batch, {case.micro_batches:,} micro-batches, "
        f"R {case.received:,} rows of its experts, n {degrees.context} context ranks, "
        f"D {m.hidden_size}, H {m.num_query_heads}, K {m.num_kv_heads}, "
        f"A {m.num_query_heads + m.num_kv_heads}, d {m.head_dim}, F {m.expert_ffn_size}, "
        f"r {m.router_size}, C {m.num_experts + int(m.skip_class)}, c {case.compute_bytes} bytes"
    )


def _explain_time(case: Case, clock: Clock, console: Console) -> None:
    time = clock.of(case)
    table = Table(title=f"{case.name}: {time.seconds:.3f} s a step", title_justify="left")
    for column in ("part", "seconds", "from", "source"):
        table.add_column(column, overflow="fold")
    for term in sorted(time.terms, key=lambda term: -term.seconds):
        table.add_row(term.name, f"{term.seconds:.4f}", term.formula, term.source)
    console.print(table)
    most = max(time.terms, key=lambda term: term.seconds)
    share = most.seconds / time.seconds
    console.print(f"most of the time: {most.name}, {share:.0%}", highlight=False)


def search_table(config: TrainConfig, found: Searched) -> Table:
    """The fastest, as words for the command line."""
    title = f"fastest of {found.tried} settings, seconds relative to the first"
    table = Table(title=title, title_justify="left")
    for column in ("time", "days", "peak GB", "settings"):
        table.add_column(column, overflow="fold")
    for one in found.best[:SHOWN]:
        words = " ".join(overrides(config, one.config)) or "as configured"
        relative = one.seconds / found.best[0].seconds
        days = one.seconds / DAY_SECONDS
        table.add_row(f"{relative:.3f}", f"{days:.1f}", f"{one.peak_bytes / GB:.1f}", words)
    return table
