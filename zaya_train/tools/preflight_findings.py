"""What preflight finds and how it is judged: pure functions of what all ranks measured."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Status = Literal["PASS", "FAIL", "SKIP"]
SLOW_RATIO = 0.85
"""Of the median of its like, below which a device or link is slow: parts of one kind differ by a
few per cent, a failing one by far more. Ours."""
FEWEST_FOR_A_MEDIAN = 4


@dataclass(frozen=True)
class Finding:
    """The outcome of one check at one place."""

    check: str
    node: str
    status: Status
    value: str
    """What was measured, with its unit."""
    rule: str = ""
    """What had to hold, with numbers; for SKIP why it was not judged."""
    rank: int | None = None
    """None: the whole node."""

    @classmethod
    def judged(cls, check: str, where: str | Place, holds: bool, value: str, rule: str) -> Finding:
        """PASS where the rule holds, else FAIL; of a node, or of a rank by its place."""
        status: Status = "PASS" if holds else "FAIL"
        if isinstance(where, str):
            return cls(check, where, status, value, rule)
        return cls(check, where.node, status, value, rule, where.rank)


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    node: str
    rank: int
    local_rank: int


@dataclass(frozen=True)
class Measured:
    """One figure of one rank, in the unit its name ends with; larger is better."""

    check: str
    place: Place
    value: float
    unit: str
    device: str


def judge_minimum(measured: Measured, least: float | None) -> Finding:
    """A figure against a limit; SKIP without one."""
    value = f"{measured.value:,.4g} {measured.unit}"
    place = measured.place
    if least is None:
        why = f"no limit known for {measured.device}"
        return Finding(measured.check, place.node, "SKIP", value, why, place.rank)
    rule = f"at least {least:,.4g} {measured.unit}"
    # NaN fails every comparison, so the rule is stated as what must hold.
    status: Status = "PASS" if measured.value >= least else "FAIL"
    return Finding(measured.check, place.node, status, value, rule, place.rank)


def slow_ones(measured: Sequence[Measured]) -> list[Finding]:
    """Those far below the median of their like, one finding each; too few to tell give none."""
    found = []
    for key in sorted({(m.check, m.device) for m in measured}):
        group = [m for m in measured if (m.check, m.device) == key]
        if len(group) < FEWEST_FOR_A_MEDIAN:
            continue
        middle = statistics.median(m.value for m in group)
        found += [
            Finding(
                f"{m.check} among ranks",
                m.place.node,
                "FAIL",
                f"{m.value:,.4g} {m.unit}",
                f"at least {SLOW_RATIO:.0%} of the median {middle:,.4g} of {len(group)} ranks",
                m.place.rank,
            )
            for m in group
            if not m.value >= SLOW_RATIO * middle
        ]
    return found


def odd_ones(check: str, facts: Mapping[Place, Mapping[str, str]]) -> list[Finding]:
    """Facts that must be the same everywhere: a FAIL per place that differs from the most frequent
    value (the first in rank order among equals), a PASS per fact where none does."""
    places = sorted(facts, key=lambda place: place.rank)
    names = sorted({name for values in facts.values() for name in values})
    found = []
    for name in names:
        values = [facts[place].get(name, "absent") for place in places]
        usual, count = Counter(values).most_common(1)[0]
        rule = f"{name} = {usual}, as on {count} of {len(places)}"
        odd = [(p, v) for p, v in zip(places, values, strict=True) if v != usual]
        found += [
            Finding(check, place.node, "FAIL", f"{name} = {value}", rule, place.rank)
            for place, value in odd
        ]
        if not odd:
            found.append(Finding(check, "all", "PASS", f"{name} = {usual}", "the same everywhere"))
    return found


def slow_pairs(rates: Mapping[tuple[str, str], float], least: float | None) -> list[Finding]:
    """Nodes that are slow with every partner they were paired with, from GB/s by pair.

    A slow node drags its partners down, but each of these is fast in its other pairing; with two
    nodes nothing tells which of them it is, and both are named.
    """
    nodes = sorted({node for pair in rates for node in pair})
    best = {n: max(rate for pair, rate in rates.items() if n in pair) for n in nodes}
    middle = statistics.median(best.values()) if best else 0.0
    found = []
    for node, rate in best.items():
        floor = max(least or 0.0, SLOW_RATIO * middle if len(nodes) >= FEWEST_FOR_A_MEDIAN else 0.0)
        value = f"{rate:,.4g} GB/s with its better partner"
        if not floor:
            found.append(Finding("link", node, "SKIP", value, "no limit and too few to compare"))
            continue
        status: Status = "PASS" if rate >= floor else "FAIL"
        found.append(Finding("link", node, status, value, f"at least {floor:,.4g} GB/s"))
    return found


def failing_nodes(findings: Iterable[Finding]) -> list[str]:
    """Nodes to exclude: those with a failed check of their own."""
    return sorted({f.node for f in findings if f.status == "FAIL" and f.node != "all"})
