"""A run's forecasts beside what it measured, for `zaya watch` and the report."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zaya_train.planning.components import GB

if TYPE_CHECKING:
    from collections.abc import Sequence

_WARM_STEPS = 3
"""Not counted where there are more: the first steps of a phase compile and fill caches."""


@dataclass(frozen=True)
class Against:
    """One phase; a figure that nobody forecast or measured is None."""

    phase: str
    expected_seconds: float | None
    seconds: float | None
    """Median of the phase's steps."""
    expected_bytes: int
    bytes: int | None
    """Peak of the fullest rank: of the device's allocator, on a CPU of the whole process."""
    source: str


def forecasts(rows: Sequence[dict[str, Any]]) -> list[Against]:
    """Of every phase that has a forecast, in order; the newest counts."""
    begun = {
        row["name"]: row
        for row in rows
        if row["kind"] == "phase" and row["event"] == "begin" and "expected_by" in row
    }
    return [_against(row, [r for r in rows if r["kind"] == "step"]) for row in begun.values()]


def _against(row: dict[str, Any], steps: Sequence[dict[str, Any]]) -> Against:
    own = [step for step in steps if step["phase"] == row["name"]]
    timed = own[_WARM_STEPS:] or own
    return Against(
        phase=row["name"],
        expected_seconds=row["expected_step_seconds"],
        seconds=statistics.median(step["step_seconds"] for step in timed) if timed else None,
        expected_bytes=row["expected_peak_bytes"],
        bytes=max((_memory(step) for step in own), default=None),
        source=row["expected_by"],
    )


def _memory(step: dict[str, Any]) -> int:
    return max([step["memory_bytes"], *step.get("memory_bytes_ranks", [])])


def cells(found: Against) -> tuple[str, str, str, str, str]:
    """Step forecast, measured, difference; memory forecast, measured."""
    expected, measured = found.expected_seconds, found.seconds
    ratio = f"{measured / expected - 1:+.0%}" if expected and measured else ""
    return (
        f"{expected:.4g} s" if expected else "unknown",
        f"{measured:.4g} s" if measured else "",
        ratio,
        f"{found.expected_bytes / GB:.2f} GB",
        f"{found.bytes / GB:.2f} GB" if found.bytes else "",
    )


def against_forecast(rows: Sequence[dict[str, Any]], phase: str) -> str:
    """In a line, of the phase under way; nothing where a run has no forecast."""
    for found in forecasts(rows):
        if found.phase == phase:
            expected, measured, ratio, memory, own = cells(found)
            step = f"step {expected}, measured {measured} {ratio}".strip()
            return f"{step}; peak {memory}, measured {own}; {found.source}"
    return ""
