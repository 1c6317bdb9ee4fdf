"""What `zaya parity` makes of three curves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from tests.helpers.tiny import tiny
from zaya_train.config.errors import ConfigError
from zaya_train.tools.parity import ParityRequest, _phase_at, arms_of
from zaya_train.tools.parity_verdict import (
    GRADIENT_LIMIT,
    LOSS_LIMIT,
    PARITY,
    SPREAD,
    Curve,
    apart_by,
    compare,
    write,
)
from zaya_train.train.state import TrainState
from zaya_train.train.step import StepResult

if TYPE_CHECKING:
    from pathlib import Path

FP8 = {
    "precision": {"compute_dtype": "bf16", "expert_dtype": "fp8"},
    "kernels.grouped_mlp": "fp8_emulated",
}
BASE = Curve((4.0, 2.0), (1.0, 1.0), 0, {"down": 0.0, "gate_up": 0.0})
OTHER = replace(BASE, losses=(4.0, 2.002), gradient_errors={"down": 0.001, "gate_up": 0.002})
GOOD = replace(BASE, losses=(4.004, 1.998), gradient_errors={"down": 0.05, "gate_up": 0.07})


def verdict(fp8: Curve = GOOD, other: Curve = OTHER) -> Any:
    curves = {"without": BASE, "rounding": other, "fp8": fp8}
    return compare(tiny(FP8), "short", 4, curves)


def test_differences_are_relative_and_have_no_sign() -> None:
    assert apart_by((4.004, 1.998), (4.0, 2.0)) == pytest.approx(0.001)
    assert math.isnan(apart_by((4.0, math.nan), (4.0, 2.0)))
    assert math.isnan(apart_by((4.0, 1.0), (4.0, 0.0)))


def test_a_curve_within_the_limits_holds() -> None:
    found = verdict()
    assert found.holds and found.first_step == 5
    loss, gradients, skipped = found.findings
    assert (loss.value, loss.rounding) == (pytest.approx(0.001), pytest.approx(0.0005))
    assert loss.limit == LOSS_LIMIT
    assert (gradients.value, gradients.limit, gradients.rounding) == (0.07, GRADIENT_LIMIT, 0.002)
    assert (skipped.value, skipped.limit) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"losses": (4.0, 2.0 * (1 + 2.01 * LOSS_LIMIT))}, "loss"),
        ({"losses": (4.0, 2.0 * (1 - 2.01 * LOSS_LIMIT))}, "loss"),
        ({"losses": (4.0, math.nan)}, "loss"),
        ({"gradient_errors": {"down": 0.01, "gate_up": 1.01 * GRADIENT_LIMIT}}, "gradients"),
        ({"gradient_errors": {"down": 0.01, "gate_up": math.nan}}, "gradients"),
        ({"gradient_errors": {"down": math.nan, "gate_up": 0.01}}, "gradients"),
        ({"skipped": 1}, "skipped"),
    ],
)
def test_each_limit_alone_decides(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    found = verdict(replace(GOOD, **changes))
    broken = [finding.what for finding in found.findings if not finding.holds]
    assert not found.holds and len(broken) == 1 and what in broken[0]
    out = StringIO()
    write(found, tmp_path, Console(file=out, width=200))
    assert f"FAILED {broken[0]}" in out.getvalue() and "fp8 does not hold" in out.getvalue()


def test_what_another_rounding_does_is_forgiven() -> None:
    """A chaotic stretch moves any curve; fp8 may move SPREAD times as far, and no further."""
    wild = replace(OTHER, losses=(4.0, 2.0 * (1 + 2 * 0.01)), skipped=2)
    assert verdict(replace(GOOD, losses=(4.0, 2.0 * (1 + 2 * 0.99 * SPREAD * 0.01))), wild).holds
    assert not verdict(replace(GOOD, losses=(4.0, 2.0 * (1 + 2.02 * SPREAD * 0.01))), wild).holds
    assert verdict(replace(GOOD, skipped=2), wild).holds
    assert not verdict(replace(GOOD, skipped=3), wild).holds


def test_the_file_holds_every_number(tmp_path: Path) -> None:
    out = StringIO()
    found = verdict()
    write(found, tmp_path, Console(file=out, width=200))
    assert "fp8 holds over 2 steps of short from step 5 on" in out.getvalue()
    plain = json.loads((tmp_path / PARITY).read_text())
    assert plain["holds"] and [f["holds"] for f in plain["findings"]] == [True] * 3
    assert plain["curves"]["fp8"]["losses"] == [4.004, 1.998]
    assert plain["precision"]["expert_dtype"] == "fp8"


def test_a_step_is_added() -> None:
    result = StepResult(
        loss=1.5, grad_norm=0.5, supervised=1, load=torch.zeros(1), applied=False, stop_signal=0
    )
    assert BASE.after(result) == replace(
        BASE, losses=(4.0, 2.0, 1.5), norms=(1.0, 1.0, 0.5), skipped=1
    )


@pytest.mark.parametrize(
    ("backend", "own"), [("fp8_emulated", "eager"), ("transformer_engine", "transformer_engine")]
)
def test_the_runs_differ_in_the_experts_products_alone(backend: str, own: str) -> None:
    config = tiny({**FP8, "kernels.grouped_mlp": backend})
    arms = arms_of(config)
    assert list(arms) == ["without", "rounding", "fp8"] and arms["fp8"] == config
    for name, expected in (("without", own), ("rounding", "reference")):
        arm = arms[name]
        assert (arm.kernels.grouped_mlp, arm.precision.expert_dtype) == (expected, "compute_dtype")
        back = replace(
            arm,
            kernels=replace(arm.kernels, grouped_mlp=config.kernels.grouped_mlp),
            precision=config.precision,
        )
        assert back == config


def test_only_the_phase_that_goes_on_can_be_compared(tmp_path: Path) -> None:
    config = tiny({**FP8, "run.only_phase": "long"})
    with pytest.raises(ConfigError, match=r"run.only_phase=long: what is there .* is in short"):
        _phase_at(ParityRequest(config, tmp_path, steps=1), TrainState())
    assert _phase_at(ParityRequest(tiny(FP8), tmp_path, steps=1), TrainState()) == "short"
