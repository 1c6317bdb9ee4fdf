"""Forecast time as tables: `zaya plan --device MI300X`, or after `--calibrate` on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from zaya_train.config.derive import phase_sequences
from zaya_train.planning.calibration import Calibration, calibrated_time
from zaya_train.planning.time import StepTime, step_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zaya_train.planning.case import Case
    from zaya_train.planning.machine import Machine

DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Clock:
    """What gives steps their seconds."""

    source: Machine | Calibration
    document_tokens: int | None = None
    """Average over tokens; None: every document as long as the context, the most work there is."""

    def of(self, case: Case) -> StepTime:
        """A full step of `case`."""
        tokens = self.document_tokens or case.phase.context_tokens
        if isinstance(self.source, Calibration):
            return calibrated_time(case, self.source, tokens)
        return step_time(case, self.source, tokens)


def phase_days(time: StepTime) -> float:
    """Of the whole phase at the speed of its full batch."""
    phase = time.case.phase
    return phase_sequences(phase) * phase.context_tokens / time.tokens_per_second / DAY_SECONDS


def time_table(cases: Sequence[Case], clock: Clock) -> Table:
    """Parts of a step by phase, speed, and what the plan takes."""
    times = {case.name: clock.of(case) for case in cases}
    ranks = cases[0].ranks
    title = f"forecast of a step on {ranks:,} x {clock.source.device}, seconds"
    table = Table(title=title, title_justify="left")
    table.add_column("part", no_wrap=True)
    for name in times:
        table.add_column(name, justify="right")
    parts = dict.fromkeys(term.name for time in times.values() for term in time.terms)
    for part in parts:
        found = [sum(t.seconds for t in time.terms if t.name == part) for time in times.values()]
        table.add_row(part, *(f"{seconds:.3f}" for seconds in found))
    table.add_section()
    rows = list(times.values())
    table.add_row("step", *(f"{time.seconds:.3f}" for time in rows))
    speeds = [time.tokens_per_second / 1e3 for time in rows]
    table.add_row("tokens/s, thousands", *(f"{speed:,.5g}" for speed in speeds))
    days = [phase_days(time) for time in rows]
    daily = [time.tokens_per_second * DAY_SECONDS / 1e9 for time in rows]
    table.add_row("tokens/day, billions", *(f"{tokens:,.4g}" for tokens in daily))
    table.add_row("days", *(f"{value:,.4g}" for value in days))
    table.add_row("device-hours", *(f"{value * 24 * ranks:,.4g}" for value in days))
    return table


def total_line(cases: Sequence[Case], clock: Clock) -> str:
    """Of all phases, and what it rests on."""
    days = sum(phase_days(clock.of(case)) for case in cases)
    said = (
        "documents as long as the context"
        if clock.document_tokens is None
        else (f"documents of {clock.document_tokens:,} tokens")
    )
    return (
        f"all phases: {days:,.4g} days, {days * 24 * cases[0].ranks:,.4g} device-hours; {said}, "
        "full batches throughout, without evaluation, saves and restarts"
    )
