"""A run's forecasts beside what it measured, for `zaya watch` and the report."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zaya_train.planning.components import GB

if TYPE_CHECKING:
    from collections.abc import Sequence

_WARM_STEPS = 3
"""Not counted where there are more: the first steps of an attempt compile and fill caches."""


@dataclass(frozen=True)
class Against:
    """One phase; a figure that nobody forecast or measured is None."""

    phase: str
    expected_seconds: float | None
    seconds: float | None
    """Median of the steps of a full batch, which the forecast is of; None before there are any."""
    expected_bytes: int
    bytes: int | None
    """Peak of the fullest rank: of the device's allocator, on a CPU of the whole process."""
    source: str


def forecasts(rows: Sequence[dict[str, Any]]) -> list[Against]:
    """Of every phase that has a forecast, in order. Attempts that expected the same, as they do on
    the same ranks and devices, are one; each other has a forecast of its own."""
    attempts: dict[tuple[Any, ...], list[int]] = {}
    begun: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["kind"] == "phase" and row["event"] == "begin" and "expected_by" in row:
            said = (row["name"], *(row[key] for key in sorted(row) if key.startswith("expected_")))
            # The newest last: an attempt may expect again what one before the last did.
            begun.pop(said, None)
            begun[said] = row
            attempts.setdefault(said, []).append(row["attempt"])
    steps = [row for row in rows if row["kind"] == "step"]
    return [_against(row, steps, attempts[said]) for said, row in begun.items()]


def _against(
    row: dict[str, Any], steps: Sequence[dict[str, Any]], attempts: Sequence[int]
) -> Against:
    own = [s for s in steps if s["phase"] == row["name"] and s["attempt"] in attempts]
    timed = [seconds for attempt in attempts for seconds in _timed(row, own, attempt)]
    return Against(
        phase=row["name"],
        expected_seconds=row["expected_step_seconds"],
        seconds=statistics.median(timed) if timed else None,
        expected_bytes=row["expected_peak_bytes"],
        bytes=max((_memory(step) for step in own), default=None),
        source=row["expected_by"],
    )


def _timed(row: dict[str, Any], steps: Sequence[dict[str, Any]], attempt: int) -> list[float]:
    """Seconds of an attempt's steps that trained on a full batch."""
    batch = row.get("expected_batch_tokens", 0)
    own = [step for step in steps if step["attempt"] == attempt]
    return [
        step["step_seconds"]
        for step in own[_WARM_STEPS:] or own
        if step["applied"] and round(step["tokens_per_second"] * step["step_seconds"]) >= batch
    ]


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
    """In a line, the newest of the phase under way; nothing where a run has no forecast."""
    of_phase = [found for found in forecasts(rows) if found.phase == phase]
    if not of_phase:
        return ""
    expected, measured, ratio, memory, own = cells(of_phase[-1])
    step = f"step {expected}, measured {measured or 'not yet'} {ratio}".strip()
    around = " with torch and all of its process" if _on_cpu(rows) else ""
    return f"{step}; peak {memory}, measured {own}{around}; {of_phase[-1].source}"


def _on_cpu(rows: Sequence[dict[str, Any]]) -> bool:
    return any(row.get("device") == "cpu" for row in rows)
