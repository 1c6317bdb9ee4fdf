"""`zaya doctor`: does the user's own configuration, shrunk, compute what it should on this machine?

Leak probe, layout certificate and kernel comparison; a table each, a JSON receipt, exit code 1 and
the culprits' names where one fails.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

import zaya_train
from zaya_train.config.build import to_dict
from zaya_train.config.check import model_problems, refuse
from zaya_train.config.derive import config_hash
from zaya_train.config.errors import EXIT_OK, ConfigError
from zaya_train.config.kernel_rules import host_problems, rounding_problems
from zaya_train.runtime.files import write_text
from zaya_train.tools import doctor_kernels, doctor_layouts, doctor_leaks
from zaya_train.tools.doctor_subject import Trial, contexts_of, shrunk

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from zaya_train.config.schema import TrainConfig
    from zaya_train.tools.doctor_kernels import Agreement
    from zaya_train.tools.doctor_layouts import Verdict
    from zaya_train.tools.doctor_leaks import Leak

EXIT_SICK = 1


@dataclass(frozen=True)
class DoctorRequest:
    """What to examine, on how many local ranks, and where the receipt goes."""

    config: TrainConfig
    ranks: int = 4
    receipt: Path | None = None


@dataclass(frozen=True)
class Findings:
    """Everything that was examined."""

    leaks: list[Leak]
    verdicts: list[Verdict]
    kernels: list[Agreement]
    seconds: float

    def culprits(self) -> list[str]:
        """One line per failed check."""
        lines = [
            f"leak probe, {leak.layout}, {leak.what}: {leak.culprit} (moved by {leak.moved:.1e})"
            for leak in self.leaks
            if not leak.ok
        ]
        lines += [
            f"{v.words}" + "".join(f"; {k} {e:.1e}" for k, e in v.errors.items())
            for v in self.verdicts
            if v.tried and not v.ok
        ]
        lines += [
            f"kernels {k.op}={k.backend}: {k.worst} differs by {k.error:.1e}, limit {k.limit:.1e}"
            for k in self.kernels
            if not k.ok
        ]
        return lines


def doctor(request: DoctorRequest, console: Console) -> int:
    """Examine, print, write the receipt; 0, or 1 where a check failed."""
    if request.ranks not in (2, 4, 8):
        raise ConfigError(f"--ranks: {request.ranks} is not 2, 4 or 8")
    config = request.config
    refuse(
        [
            *model_problems(config.model),
            *host_problems(config.kernels, "zaya doctor"),
            *rounding_problems(config.precision),
        ]
    )
    findings = examine(request)
    console.print(_leak_table(findings.leaks))
    console.print(_layout_table(findings.verdicts))
    console.print(_kernel_table(findings.kernels))
    if request.receipt is not None:
        write_text(request.receipt, json.dumps(receipt(request, findings), indent=1) + "\n")
        console.print(f"receipt: {request.receipt}", highlight=False, soft_wrap=True)
    for verdict in findings.verdicts:
        if not verdict.tried:
            console.print(f"not possible {verdict.words}", highlight=False, soft_wrap=True)
    culprits = findings.culprits()
    for line in culprits:
        console.print(f"FAILED {line}", highlight=False, markup=False, soft_wrap=True)
    tried = sum(verdict.tried for verdict in findings.verdicts)
    checks = len(findings.leaks) + tried + len(findings.kernels)
    console.print(
        f"{checks - len(culprits)} of {checks} checks passed in {findings.seconds:.0f} s",
        highlight=False,
    )
    return EXIT_SICK if culprits else EXIT_OK


def examine(request: DoctorRequest) -> Findings:
    """All checks."""
    started = time.monotonic()
    small = shrunk(request.config)
    leaks, verdicts = [], []
    for context in contexts_of(request.config):
        trials = doctor_layouts.trials_of(small, context, request.ranks)
        leaks += doctor_leaks.probe(small, context, doctor_layouts.SERIAL)
        shared = [trial for trial in trials if trial.context > 1 and not trial.impossible]
        if shared:
            most = max(shared, key=lambda trial: trial.context)
            leaks += doctor_leaks.probe(small, context, Trial(most.name, 1, 1, most.context))
        verdicts += doctor_layouts.certify(small, context, trials)
    kernels = doctor_kernels.compare_kernels(request.config)
    return Findings(leaks, verdicts, kernels, time.monotonic() - started)


def receipt(request: DoctorRequest, findings: Findings) -> dict[str, Any]:
    """Figures, versions and the configuration they belong to."""
    return {
        "passed": not findings.culprits(),
        "culprits": findings.culprits(),
        "config_hash": config_hash(request.config),
        "examined_as": to_dict(shrunk(request.config).model),
        "kernels_config": to_dict(request.config.kernels),
        "ranks": request.ranks,
        "tolerance": {"layouts": doctor_layouts.TOLERANCE, "leaks": doctor_leaks.TOLERANCE},
        "leaks": [asdict(leak) | {"ok": leak.ok} for leak in findings.leaks],
        "layouts": [doctor_layouts.figures(verdict) for verdict in findings.verdicts],
        "kernels": [asdict(kernel) | {"ok": kernel.ok} for kernel in findings.kernels],
        "versions": {
            "zaya_train": zaya_train.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "seconds": round(findings.seconds, 1),
    }


def _leak_table(leaks: list[Leak]) -> Table:
    table = Table(title="leak probe: what moves that must not", title_justify="left")
    for column in ("phases", "layout", "check"):
        table.add_column(column)
    table.add_column("moved", justify="right")
    table.add_column("")
    for leak in leaks:
        phases = ", ".join(leak.context.phases)
        table.add_row(phases, leak.layout, leak.what, f"{leak.moved:.1e}", _mark(leak.ok))
    return table


def _layout_table(verdicts: list[Verdict]) -> Table:
    title = "layout certificate: largest relative difference from one process"
    table = Table(title=title, title_justify="left")
    for column in ("phases", "layout"):
        table.add_column(column)
    kinds = ("loss", "gradients", "weights", "biases")
    for kind in kinds:
        table.add_column(kind, justify="right")
    table.add_column("")
    for verdict in verdicts:
        cells = [f"{verdict.errors[kind]:.1e}" if kind in verdict.errors else "-" for kind in kinds]
        phases = ", ".join(verdict.context.phases)
        mark = _mark(verdict.ok) if verdict.tried else "not possible"
        table.add_row(phases, verdict.trial.name, *cells, mark)
    return table


def _kernel_table(kernels: list[Agreement]) -> Table:
    title = "kernels against the reference in float64"
    table = Table(title=title, title_justify="left")
    for column in ("operation", "back end", "widths"):
        table.add_column(column)
    for column in ("error", "reference's own", "limit"):
        table.add_column(column, justify="right")
    table.add_column("")
    for kernel in kernels:
        errors = (f"{e:.1e}" for e in (kernel.error, kernel.reference_error, kernel.limit))
        table.add_row(kernel.op, kernel.backend, kernel.shape, *errors, _mark(kernel.ok))
    return table


def _mark(ok: bool) -> str:
    return "ok" if ok else "FAILED"
