"""What `zaya bench step` found: figures, table and JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.table import Table

from zaya_train.config.derive import config_hash
from zaya_train.runtime.device import DeviceFacts, describe
from zaya_train.runtime.files import write_json
from zaya_train.tools.revision import revision
from zaya_train.tools.trace_groups import Breakdown, time_by_group

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from zaya_train.config.schema import TrainConfig
    from zaya_train.runtime.dist import Ranks

FIGURES, TRACE = "step.json", "trace.json"
GB = 10**9


@dataclass(frozen=True)
class StepFigures:
    """Timed steps of one phase, as rank 0 saw them."""

    config: TrainConfig
    ranks: Ranks
    phase: str
    documents: tuple[int, ...]
    """Lengths of a row's documents."""
    rows: list[dict[str, Any]]
    """Of the metrics, one for each timed step."""
    micro_batches: int
    """Of a timed step on every rank."""
    profiled_micro_batches: int
    memory_bytes: int
    """Peak of this rank, profile not included."""

    @cached_property
    def middle(self) -> dict[str, Any]:
        """The row of the median step: its seconds and tokens per second belong together."""
        median = statistics.median_low(row["step_seconds"] for row in self.rows)
        return next(row for row in self.rows if row["step_seconds"] == median)

    @property
    def device(self) -> DeviceFacts:
        return describe(self.ranks.device)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, of what the median step did."""
        tokens = self.config.plan.phases[self.phase].global_batch_tokens
        flops: float = self.middle["flops"]
        return flops / tokens

    def plain(self, breakdown: Breakdown | None) -> dict[str, Any]:
        """For JSON; seconds, bytes, tokens."""
        return {
            "recipe": self.config.run.name,
            "config_hash": config_hash(self.config),
            "phase": self.phase,
            "revision": asdict(revision()),
            "device": asdict(self.device),
            "ranks": self.ranks.world_size,
            "kernels": asdict(self.config.kernels),
            "step_tokens": self.config.plan.phases[self.phase].global_batch_tokens,
            "micro_batches": self.micro_batches,
            "documents": list(self.documents),
            "step_seconds": self.middle["step_seconds"],
            "data_seconds": self.middle["data_seconds"],
            "tokens_per_second": self.middle["tokens_per_second"],
            "flops_per_token": self.flops_per_token,
            "mfu": self.middle.get("mfu"),
            "mfu_measured": self.middle["mfu_measured"],
            "memory_bytes": self.memory_bytes,
            "steps": [
                {key: row[key] for key in ("step_seconds", "tokens_per_second", "loss", "applied")}
                for row in self.rows
            ],
            "profile": None
            if breakdown is None
            else {"micro_batches": self.profiled_micro_batches, **asdict(breakdown)},
        }


def report(figures: StepFigures, folder: Path, console: Console) -> None:
    """Write FIGURES into `folder`, which has the trace already, and print it."""
    breakdown = None
    if figures.profiled_micro_batches:
        breakdown = time_by_group(json.loads((folder / TRACE).read_text(encoding="utf-8")))
    write_json(folder / FIGURES, figures.plain(breakdown))
    console.print(_summary(figures))
    if breakdown:
        console.print(
            f"one step of {figures.profiled_micro_batches} micro-batches under the profiler, "
            f"{breakdown.clock} time:"
        )
        console.print(_table(breakdown))
        console.print(f"trace: {folder / TRACE}", highlight=False, soft_wrap=True)
    console.print(f"figures: {folder / FIGURES}", highlight=False, soft_wrap=True)


def _summary(figures: StepFigures) -> Table:
    times = [row["step_seconds"] for row in figures.rows]
    skipped = sum(not row["applied"] for row in figures.rows)
    name = figures.device.name
    mfu = figures.middle.get("mfu")
    said = f"no peak known for {name}" if mfu is None else f"{mfu:.1%}"
    table = Table()
    table.add_column(f"{figures.config.run.name}, phase {figures.phase}")
    table.add_column("value", justify="right")
    rows = [
        ("device", f"{figures.ranks.world_size} x {name}"),
        ("step, median of", f"{len(times)}: {figures.middle['step_seconds']:.3f} s"),
        ("from, to", f"{min(times):.3f}, {max(times):.3f} s"),
        ("of it waiting for data", f"{figures.middle['data_seconds']:.3f} s"),
        ("micro-batches of a rank", f"{figures.micro_batches:,}"),
        ("tokens/s", f"{figures.middle['tokens_per_second']:,.0f}"),
        ("TFLOP a token, forward and backward", f"{figures.flops_per_token / 1e12:.6f}"),
        ("MFU", said),
        ("of what a plain product reaches", f"{figures.middle['mfu_measured']:.1%}"),
        ("peak memory of rank 0", f"{figures.memory_bytes / GB:.2f} GB"),
    ]
    if skipped:
        rows.append(("steps skipped as not finite or spikes", str(skipped)))
    for row in rows:
        table.add_row(*row)
    return table


def _table(breakdown: Breakdown) -> Table:
    table = Table()
    table.add_column("operation")
    for column in ("ms", "share"):
        table.add_column(column, justify="right")
    for name, seconds in breakdown.seconds.items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / breakdown.total_seconds:.1%}")
    table.add_section()
    table.add_row("total", f"{1e3 * breakdown.total_seconds:.2f}", "")
    table.add_row("step on the host", f"{1e3 * breakdown.step_seconds:.2f}", "")
    return table
