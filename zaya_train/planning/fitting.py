"""Whether a launch fits its devices, and the cheapest change with which it would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_train.config.errors import ConfigError
from zaya_train.planning.case import cases_of
from zaya_train.planning.changes import leaner, overrides
from zaya_train.planning.components import GB, RESERVE, in_gb
from zaya_train.planning.machine import machine_of
from zaya_train.planning.memory import forecast, least_bytes
from zaya_train.planning.time import plan_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zaya_train.config.schema import KernelsConfig, TrainConfig
    from zaya_train.planning.machine import Machine

COUNTED = ("eager", "gram", "sdpa")
"""Back ends whose kept tensors the forecast counts (planning.activations)."""
KEEP_NOTHING = ("newton_schulz",)
"""Operations of the optimizer, of which no back end keeps anything for the backward pass."""
TARGET = "MI300X"
"""By whose rates changes are compared where the device is not known."""


@dataclass(frozen=True)
class Budget:
    """Memory of one device."""

    memory_gb: float
    """10^9 bytes."""
    source: str
    """Who says so, for messages."""
    machine: Machine | None = None
    """By whose rates changes are compared; None: by TARGET's data sheet."""

    @property
    def usable_bytes(self) -> float:
        return self.memory_gb * GB * (1 - RESERVE)


def judge(
    config: TrainConfig, ranks: int, budget: Budget | None, names: tuple[str, ...] = ()
) -> str:
    """Whether a launch may start, for `plan`, `train` and `submit` alike: what is to be said where
    it may and yet does not fit, nothing where it fits or there is no limit. ConfigError where it
    may not: `runtime.memory_check` warns instead, and kernels that keep other tensors than those
    counted are refused only for what no kernel changes."""
    if budget is None:
        return ""
    cases = cases_of(config, ranks, names)
    return judge_peaks(config, ranks, {c.name: forecast(c).peak.bytes for c in cases}, budget)


def judge_peaks(config: TrainConfig, ranks: int, peaks: Mapping[str, int], budget: Budget) -> str:
    """The same of known `peaks` by phase."""
    try:
        refuse_peaks(config, ranks, peaks, budget)
    except ConfigError as error:
        if config.runtime.memory_check == "warn":
            return f"launched although {error}"
        others = ", ".join(_not_counted(config.kernels))
        least = max(least_bytes(case) for case in cases_of(config, ranks, peaks))
        if others and least <= budget.usable_bytes:
            return f"by eager kernels, not refused because of {others}: {error}"
        said = f"; with whatever {others} keeps, {in_gb(least)} GB at least" if others else ""
        raise ConfigError(f"{error}{said}; runtime.memory_check=warn launches anyway") from error
    return ""


def verdict(config: TrainConfig, ranks: int, peaks: Mapping[str, int], budget: Budget) -> str:
    """`judge_peaks` for a preview, which says so where a launch fits, too."""
    if said := judge_peaks(config, ranks, peaks, budget):
        return f"warning: {said}"
    name, peak = max(peaks.items(), key=lambda item: item[1])
    others = dict.fromkeys(key.partition("=")[2] for key in _not_counted(config.kernels))
    return f"fits: peak {in_gb(peak)} GB (phase {name}) of {_usable(budget)}" + (
        f"; counted as of eager kernels, not of {', '.join(others)}" if others else ""
    )


def _not_counted(kernels: KernelsConfig) -> list[str]:
    """Keys of back ends of whose kept tensors the forecast knows nothing."""
    return [
        f"kernels.{key}={name}"
        for key, name in vars(kernels).items()
        if isinstance(name, str) and name not in COUNTED and key not in KEEP_NOTHING
    ]


def refuse(config: TrainConfig, ranks: int, budget: Budget, names: tuple[str, ...] = ()) -> None:
    """ConfigError where a phase's forecast peak leaves less than the reserve free."""
    cases = cases_of(config, ranks, names)
    peaks = {case.name: forecast(case).peak.bytes for case in cases}
    refuse_peaks(config, ranks, peaks, budget)


def refuse_peaks(config: TrainConfig, ranks: int, peaks: Mapping[str, int], budget: Budget) -> None:
    """The same of known `peaks` by phase; changes are judged by forecast."""
    short = {name: peak for name, peak in peaks.items() if peak > budget.usable_bytes}
    if short:
        better = advice(config, ranks, [*peaks], [*short], budget)
        raise ConfigError(f"{_said(short, budget)}; {better}")


def _said(short: Mapping[str, int], budget: Budget) -> str:
    (worst, peak), *others = sorted(short.items(), key=lambda item: -item[1])
    said = f"phase {worst}: a peak of {in_gb(peak)} GB exceeds {_usable(budget)}"
    if others:
        listed = ", ".join(f"{name} ({in_gb(peak)})" for name, peak in others)
        said += f", and so does that of {listed}"
    return said


def _usable(budget: Budget) -> str:
    return f"{in_gb(budget.usable_bytes)} GB, {1 - RESERVE:.0%} of {budget.source}"


def advice(
    config: TrainConfig,
    ranks: int,
    judged: Sequence[str],
    short: Sequence[str],
    budget: Budget,
) -> str:
    """The cheapest change of the phases `short` under which all those `judged` fit: parallel.* is
    every phase's. Cheap is what takes the least time by forecast; of equals, the leanest."""
    machine = budget.machine or machine_of(TARGET, config.precision)
    now = plan_seconds(cases_of(config, ranks, judged), machine)
    for found in leaner(config, ranks, short):
        fitting = []
        for other in found:
            cases = cases_of(other, ranks, judged)
            peak = max(forecast(case).peak.bytes for case in cases)
            if peak <= budget.usable_bytes:
                more = plan_seconds(cases, machine) / now - 1
                fitting.append((round(more, 3), peak, " ".join(overrides(config, other))))
        if fitting:
            more, peak, said = min(fitting)
            return (
                f"the cheapest change that fits: {said} ({in_gb(peak)} GB; {more:+.1%} time by "
                f"forecast for {machine.device})"
            )
    return "no setting of parallel.* makes it fit: more ranks to a shard or more memory"
