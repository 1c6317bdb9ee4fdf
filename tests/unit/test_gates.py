"""What a phase must have reached before the run leaves it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from zaya_train.config.schema import GateConfig
from zaya_train.phases.gates import WITHOUT_STEP, conditions, missed

GATE = GateConfig(validation_loss={"a": 2.0}, most_skip_rate=0.1, least_load_entropy=0.9)
GOOD: dict[str, Any] = {"validation_loss": {"a": 2.0}, "skip_rate": 0.1, "load_entropy": 0.9}


def test_a_gate_that_asks_for_nothing_is_always_met() -> None:
    assert missed(GateConfig(), {}) == [] == conditions(GateConfig())


def test_limits_are_met_where_reached_exactly() -> None:
    assert missed(GATE, GOOD) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"validation_loss": {"a": 2.5}}, "validation_loss.a: 2.5, at most 2.0"),
        ({"validation_loss": {"a": math.nan}}, "validation_loss.a: nan, at most 2.0"),
        ({"validation_loss": {"b": 1.0}}, "validation_loss.a: not measured, at most 2.0"),
        ({"skip_rate": 0.2}, "most_skip_rate: 0.2, at most 0.1"),
        ({"skip_rate": None}, "most_skip_rate: not measured, at most 0.1"),
        ({"skip_rate": math.nan}, "most_skip_rate: nan, at most 0.1"),
        ({"load_entropy": 0.5}, "least_load_entropy: 0.5, at least 0.9"),
        ({"load_entropy": math.nan}, "least_load_entropy: nan, at least 0.9"),
    ],
)
def test_what_is_missed_is_one_line(change: dict[str, Any], line: str) -> None:
    assert missed(GATE, {**GOOD, **change}) == [line]


def test_a_phase_without_a_step_is_judged_by_its_losses_alone() -> None:
    assert missed(GATE, {"validation_loss": {"a": 2.0}, WITHOUT_STEP: True}) == []
    assert len(missed(GATE, {"validation_loss": {"a": 2.5}, WITHOUT_STEP: True})) == 1
    assert len(missed(GATE, {WITHOUT_STEP: True})) == 1


def test_nothing_measured_meets_nothing() -> None:
    assert len(missed(GATE, {})) == 3
