"""Whether a launch fits its devices, and the cheapest change with which it would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_train.config.errors import ConfigError
from zaya_train.planning.case import cases_of
from zaya_train.planning.changes import changed, overrides
from zaya_train.planning.components import GB, RESERVE
from zaya_train.planning.memory import forecast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.config.schema import TrainConfig


@dataclass(frozen=True)
class Budget:
    """Memory of one device."""

    memory_gb: float
    """10^9 bytes."""
    source: str
    """Who says so, for messages."""

    @property
    def usable_bytes(self) -> float:
        return self.memory_gb * GB * (1 - RESERVE)


def refuse(config: TrainConfig, ranks: int, budget: Budget, names: tuple[str, ...] = ()) -> None:
    """ConfigError where a phase's forecast peak leaves less than the reserve free."""
    cases = cases_of(config, ranks, names)
    peaks = {case.name: forecast(case).peak.bytes for case in cases}
    refuse_peaks(config, ranks, peaks, budget)


def refuse_peaks(config: TrainConfig, ranks: int, peaks: Mapping[str, int], budget: Budget) -> None:
    """The same of known `peaks` by phase; changes are judged by forecast."""
    short = {name: peak for name, peak in peaks.items() if peak > budget.usable_bytes}
    if short:
        raise ConfigError(f"{_said(short, budget)}; {advice(config, ranks, short, budget)}")


def _said(short: Mapping[str, int], budget: Budget) -> str:
    (worst, peak), *others = sorted(short.items(), key=lambda item: -item[1])
    said = (
        f"phase {worst}: a peak of {peak / GB:.1f} GB exceeds {budget.usable_bytes / GB:.1f} GB, "
        f"{1 - RESERVE:.0%} of {budget.source}"
    )
    if others:
        listed = ", ".join(f"{name} ({peak / GB:.1f})" for name, peak in others)
        said += f", and so does that of {listed}"
    return said


def advice(config: TrainConfig, ranks: int, short: Mapping[str, int], budget: Budget) -> str:
    """The cheapest change under which all of the phases `short` fit."""
    for cost, other in changed(config, ranks, list(short)):
        peak = max(forecast(case).peak.bytes for case in cases_of(other, ranks, short))
        if peak <= budget.usable_bytes:
            return (
                f"the cheapest change that fits: {overrides(config, other)} "
                f"({peak / GB:.1f} GB; costs {cost})"
            )
    return "no setting of parallel.* makes it fit: more ranks to a shard or more memory"
