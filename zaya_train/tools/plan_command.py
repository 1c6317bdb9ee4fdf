"""`zaya plan`: what its options ask for, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_train.config.check import check_all
from zaya_train.config.errors import ConfigError
from zaya_train.planning.calibration import Calibration, keep, load
from zaya_train.planning.case import cases_of
from zaya_train.planning.expected import configured
from zaya_train.planning.fitting import Budget, verdict
from zaya_train.planning.machine import Machine, machine_of, with_links, with_preflight
from zaya_train.planning.memory import forecast
from zaya_train.planning.search import search
from zaya_train.runtime.device import describe
from zaya_train.tools.plan import PlanRequest, show_plan
from zaya_train.tools.plan_calibrate import calibrate
from zaya_train.tools.plan_explain import explain, search_table
from zaya_train.tools.plan_phases import show_phases
from zaya_train.tools.plan_sources import source_lines
from zaya_train.tools.plan_time import Clock, time_table, total_line
from zaya_train.tools.rehearsal_table import RehearsalRequest, show_rehearsal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from rich.console import Console

    from zaya_train.config.schema import TrainConfig
    from zaya_train.planning.case import Case


_NODE_RANKS = 8
_OF_DEVICE = ("preflight", "inside_gb_per_second", "between_gb_per_second", "node_ranks")
"""Options that change what a named device can do."""


def run_plan(
    options: argparse.Namespace, config: TrainConfig, chain: bool, console: Console
) -> None:
    """Preview, and refuse what does not fit: by forecast, or by rehearsal with `--rehearse`.

    Raises:
        ConfigError: a rule is broken, or memory is short.
    """
    phases = tuple(options.phase or ())
    known = config.plan.phases
    check_all(
        config,
        options.ranks,
        [f"plan.phases: no phase {name}" for name in phases if name not in known],
    )
    clock = clock_of(options, config)
    budget = budget_of(options, config, clock)
    memory_gb = budget.memory_gb if budget else None
    request = PlanRequest(config, options.ranks, memory_gb)
    (show_phases if chain else show_plan)(request, console)
    for line in source_lines(config):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    cases = cases_of(config, options.ranks, phases)
    show_time(cases, clock, console)
    if options.explain:
        for case in cases:
            explain(case, clock, console)
    if options.search:
        show_search(config, options.ranks, clock, budget, console)
    if options.rehearse:
        source = budget.source if budget else ""
        rehearsal = RehearsalRequest(config, options.ranks, phases, memory_gb, source)
        show_rehearsal(rehearsal, console)
    elif budget:
        peaks = {case.name: forecast(case).peak.bytes for case in cases}
        said = verdict(config, options.ranks, peaks, budget)
        console.print(said, markup=False, highlight=False, soft_wrap=True)


def budget_of(
    options: argparse.Namespace, config: TrainConfig, clock: Clock | None
) -> Budget | None:
    """--memory-gb, else what a launch of `config` is judged by, else the named device's."""
    machine = clock.source if clock and isinstance(clock.source, Machine) else None
    if options.memory_gb is not None:
        return Budget(options.memory_gb, f"--memory-gb {options.memory_gb:g}", machine)
    if machine is None:
        return configured(config)
    said = f"the {machine.memory_gb:g} GB of {machine.device}"
    return configured(config, machine) or Budget(machine.memory_gb, said, machine)


def clock_of(options: argparse.Namespace, config: TrainConfig) -> Clock | None:
    """What gives steps their seconds: the named device, or this machine's calibration."""
    tokens = options.document_tokens
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--document-tokens {tokens}: must be positive")
    if options.calibrate:
        keep(config, calibrate(config, options.ranks))
    if options.device:
        node_ranks = _NODE_RANKS if options.node_ranks is None else options.node_ranks
        if node_ranks < 1:
            raise ConfigError(f"--node-ranks {node_ranks}: must be positive")
        machine = machine_of(options.device, config.precision, node_ranks)
        if options.preflight:
            machine = with_preflight(machine, options.preflight)
        links = (options.inside_gb_per_second, options.between_gb_per_second)
        return Clock(with_links(machine, *links), tokens)
    idle = [
        f"--{name.replace('_', '-')}" for name in _OF_DEVICE if getattr(options, name) is not None
    ]
    if idle:
        raise ConfigError(f"{', '.join(idle)}: needs a --device, whose rates it replaces")
    found = load(config, describe(torch.device("cpu")).name, options.ranks)
    return Clock(found, tokens) if found else None


def show_search(
    config: TrainConfig,
    ranks: int,
    clock: Clock | None,
    budget: Budget | None,
    console: Console,
) -> None:
    """The fastest layouts in words for the command line. ConfigError without a device to judge
    them by."""
    if clock is None or not isinstance(clock.source, Machine) or budget is None:
        raise ConfigError("--search: needs a --device, by whose rates layouts are judged")
    found = search(
        config, (ranks, clock.source.node_ranks), budget, lambda case: clock.of(case).seconds
    )
    console.print(search_table(config, found))
    for why, count in found.refused.items():
        console.print(f"{count} of {found.tried} settings are out: {why}", highlight=False)
    if not found.best:
        raise ConfigError(f"--search: none of {found.tried} settings fits {budget.memory_gb:g} GB")


def show_time(cases: Sequence[Case], clock: Clock | None, console: Console) -> None:
    """Seconds by part, or why there are none."""
    if clock is None:
        console.print(
            "no forecast of time: name a --device, or --calibrate on this machine's CPU",
            highlight=False,
        )
        return
    console.print(time_table(cases, clock))
    console.print(total_line(cases, clock), highlight=False, soft_wrap=True)
    if isinstance(clock.source, Machine):
        for line in clock.source.lacks:
            console.print(f"by the data sheet: {line}", highlight=False, soft_wrap=True)
    if isinstance(clock.source, Calibration):
        console.print(
            f"by a calibration, at most {clock.source.largest_error:.0%} off its own steps",
            highlight=False,
        )
