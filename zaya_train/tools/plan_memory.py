"""Forecast memory of rank 0 as a table: `zaya plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from zaya_train.planning.components import COMPONENTS, GB, MB, RESERVE
from zaya_train.planning.memory import forecast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zaya_train.planning.case import Case

_SHOWN_SHARE = 0.001
"""Of the largest peak; components below it have no row."""


def memory_table(cases: Sequence[Case], memory_gb: float | None = None) -> Table:
    """Components at each phase's fullest moment, and what is left of `memory_gb`."""
    found = {case.name: forecast(case).peak for case in cases}
    most = max(peak.bytes for peak in found.values())
    unit, word = (GB, "GB (10^9 bytes)") if most >= GB else (MB, "MB (10^6 bytes)")
    title = f"forecast peak memory of rank 0 of {cases[0].ranks:,}, {word}"
    table = Table(title=title, title_justify="left")
    table.add_column("component", no_wrap=True)
    for name in found:
        table.add_column(name, justify="right")
    for component in COMPONENTS:
        sizes = [peak.components.get(component, 0) for peak in found.values()]
        if max(sizes) >= _SHOWN_SHARE * most:
            table.add_row(component, *(f"{size / unit:.2f}" for size in sizes))
    table.add_section()
    table.add_row("peak", *(f"{peak.bytes / unit:.2f}" for peak in found.values()))
    table.add_row("reached in", *(peak.name for peak in found.values()))
    if memory_gb is not None:
        free = [memory_gb - peak.bytes / GB for peak in found.values()]
        table.add_row(f"free of {memory_gb:g}", *(f"{gb:.1f}" for gb in free))
        shares = (f"{gb / memory_gb:.0%}" for gb in free)
        table.add_row(f"margin, at least {RESERVE:.0%}", *shares)
    return table
