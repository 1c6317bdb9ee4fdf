"""What `zaya parity` finds in its three curves: limits, verdict, table and file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from zaya_train.config.derive import config_hash
from zaya_train.config.kinds import math_hash
from zaya_train.runtime.files import write_json
from zaya_train.tools.revision import revision

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from rich.console import Console

    from zaya_train.config.schema import TrainConfig
    from zaya_train.train.step import StepResult

PARITY = "parity.json"
EXIT_APART = 1
LOSS_LIMIT = 0.0025
"""Mean relative difference of the loss; DeepSeek-V3's runs in fp8 stayed below it (2412.19437)."""
SPREAD = 3.0
"""Or so many times what another rounding of the same arithmetic gives on these steps."""
GRADIENT_LIMIT = 0.25
"""Relative error of an expert's gradient in the first step. Rounding gives about 0.1: e5m2 errs by
5 % (root mean square), e4m3 by 2.6 %, and a gradient passes several of both; what flushes to zero,
saturates or is scaled twice gives 1 and more."""


@dataclass(frozen=True)
class Curve:
    """Some steps of one run."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    """Of the gradient, before clipping."""
    skipped: int = 0
    gradient_errors: dict[str, float] = field(default_factory=dict)
    """Of some experts' weights in the first step, against the run without fp8, relative."""

    def after(self, result: StepResult) -> Curve:
        """With one step more."""
        return replace(
            self,
            losses=(*self.losses, result.loss),
            norms=(*self.norms, result.grad_norm),
            skipped=self.skipped + int(not result.applied),
        )


@dataclass(frozen=True)
class Finding:
    """One comparison; it holds where the value is not above its limit."""

    what: str
    value: float
    limit: float
    rounding: float
    """The same of the run that only rounds otherwise."""

    @property
    def holds(self) -> bool:
        # NaN is no number that holds.
        return self.value <= self.limit


@dataclass(frozen=True)
class Verdict:
    """Whether experts in fp8 may stand in for those without."""

    config: TrainConfig
    phase: str
    first_step: int
    curves: dict[str, Curve]
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)

    def plain(self) -> dict[str, Any]:
        """For the file."""
        return {
            "holds": self.holds,
            "findings": [{**asdict(f), "holds": f.holds} for f in self.findings],
            "phase": self.phase,
            "first_step": self.first_step,
            "curves": {name: asdict(curve) for name, curve in self.curves.items()},
            "kernels": asdict(self.config.kernels),
            "precision": asdict(self.config.precision),
            "config_hash": config_hash(self.config),
            "math_hash": math_hash(self.config),
            "revision": asdict(revision()),
        }


def compare(config: TrainConfig, phase: str, step: int, curves: dict[str, Curve]) -> Verdict:
    """`curves`: without, rounding and fp8; `step`: done before the first of theirs."""
    base, other, fp8 = (curves[name] for name in ("without", "rounding", "fp8"))
    apart = [apart_by(curve.losses, base.losses) for curve in (fp8, other)]
    gradients = [largest(curve.gradient_errors.values()) for curve in (fp8, other)]
    return Verdict(
        config,
        phase,
        step + 1,
        curves,
        (
            Finding(
                "loss, mean difference over the steps",
                apart[0],
                max(LOSS_LIMIT, SPREAD * apart[1]),
                apart[1],
            ),
            Finding(
                "experts' gradients of the first step", gradients[0], GRADIENT_LIMIT, gradients[1]
            ),
            Finding("steps skipped", fp8.skipped, max(base.skipped, other.skipped), other.skipped),
        ),
    )


def largest(errors: Iterable[float]) -> float:
    """NaN where one is: `max` finds it in the first place only."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def apart_by(found: Sequence[float], expected: Sequence[float]) -> float:
    """Mean of |found - expected| / expected; NaN where a number is not finite."""
    gaps = [abs(a - b) / b if b else math.nan for a, b in zip(found, expected, strict=True)]
    return math.fsum(gaps) / len(gaps) if all(map(math.isfinite, gaps)) else math.nan


def write(verdict: Verdict, folder: Path, console: Console) -> None:
    """Print the table and the verdict; PARITY into `folder`."""
    write_json(folder / PARITY, verdict.plain())
    console.print(_steps(verdict))
    console.print(_findings(verdict))
    broken = [finding for finding in verdict.findings if not finding.holds]
    for finding in broken:
        said = f"{finding.what} {finding.value:.4g}, limit {finding.limit:.4g}"
        console.print(f"FAILED {said}", highlight=False, soft_wrap=True)
    count = len(verdict.curves["fp8"].losses)
    said = "does not hold" if broken else "holds"
    console.print(
        f"fp8 {said} over {count} steps of {verdict.phase} from step {verdict.first_step} on; "
        f"{folder / PARITY}",
        highlight=False,
        soft_wrap=True,
    )


def _steps(verdict: Verdict) -> Table:
    table = Table()
    for name in ("step", "loss without", "rounding", "fp8", "gradient norm", "rounding", "fp8"):
        table.add_column(name, justify="right")
    base, *others = (verdict.curves[name] for name in ("without", "rounding", "fp8"))
    for i, (loss, norm) in enumerate(zip(base.losses, base.norms, strict=True)):
        losses = [f"{curve.losses[i] / loss - 1:+.2%}" for curve in others]
        norms = [f"{curve.norms[i] / norm - 1:+.2%}" for curve in others]
        step = str(verdict.first_step + i)
        table.add_row(step, f"{loss:.4f}", *losses, f"{norm:.3f}", *norms)
    return table


def _findings(verdict: Verdict) -> Table:
    table = Table()
    for name in ("relative to the run without fp8", "fp8", "limit", "another rounding"):
        table.add_column(name, justify="left" if name.startswith("rel") else "right")
    for finding in verdict.findings:
        numbers = (finding.value, finding.limit, finding.rounding)
        table.add_row(finding.what, *(f"{number:.4g}" for number in numbers))
    return table
