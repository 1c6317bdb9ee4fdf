"""`zaya plan`: what its options ask for, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_train.config.check import check_all
from zaya_train.planning.fitting import Budget, refuse
from zaya_train.tools.plan import PlanRequest, show_plan
from zaya_train.tools.plan_phases import show_phases
from zaya_train.tools.rehearsal_table import RehearsalRequest, show_rehearsal

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from zaya_train.config.schema import TrainConfig


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
    request = PlanRequest(config, options.ranks, options.memory_gb)
    (show_phases if chain else show_plan)(request, console)
    if options.rehearse:
        show_rehearsal(RehearsalRequest(config, options.ranks, phases, options.memory_gb), console)
    elif options.memory_gb is not None:
        budget = Budget(options.memory_gb, f"--memory-gb {options.memory_gb:g}")
        refuse(config, options.ranks, budget, phases)
