"""Polynomials by name against their sources, and what a configuration may not ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest
from zaya_kernels.newton_schulz.op import QUINTIC

from tests.helpers.tiny import tiny
from zaya_train.config import newton_schulz
from zaya_train.config.check import problems
from zaya_train.config.newton_schulz import polynomials, reach
from zaya_train.config.schema import MuonConfig

MUON = "optim.muon.newton_schulz"


def muon(**changes: Any) -> MuonConfig:
    return MuonConfig(**{"learning_rate": 0.1, **changes})


def test_the_default_is_the_published_quintic() -> None:
    assert polynomials(muon()) == (QUINTIC,) * 5


def extremes(polynomial: tuple[float, float, float], low: float, high: float) -> list[float]:
    """Its values at both ends of [low, high] and where its slope is zero in between."""
    a, b, c = polynomial
    root = math.sqrt(9 * b * b - 20 * a * c)
    inner = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
    points = [low, *inner, high]
    assert points == sorted(points)
    return [x * (a + x * x * (b + c * x * x)) for x in points]


def test_polar_express_is_the_minimax_sequence_of_its_paper() -> None:
    """Each quintic swings equally far about its centre (Chebyshev) over what the one before leaves,
    cushioned as in the paper's Algorithm 1, and is centred so that the ends of the whole
    interval lie equally far from 1."""
    low, high, cushion = 1e-3, 1.0, 0.02407327424182761
    for polynomial in newton_schulz._POLAR_EXPRESS[:5]:
        cushioned = max(low, cushion * high)
        first, top, bottom, last = extremes(polynomial, cushioned, high)
        assert first == pytest.approx(bottom, rel=1e-6)
        assert last == pytest.approx(top, rel=1e-6)
        low = extremes(polynomial, low, high)[0]
        assert low + top == pytest.approx(2.0, rel=1e-9)
        high = top
    # What the rest converges to: Newton-Schulz of order five.
    assert newton_schulz._POLAR_EXPRESS[-1] == (15 / 8, -10 / 8, 3 / 8)
    assert newton_schulz._POLAR_EXPRESS[-2] == pytest.approx((15 / 8, -10 / 8, 3 / 8), rel=2e-6)


def test_all_but_the_last_of_polar_express_are_stretched() -> None:
    named = polynomials(muon(newton_schulz_coefficients="polar_express", newton_schulz_steps=9))
    assert len(named) == 9 and named[7] == named[8] == (1.875, -1.25, 0.375)
    for stretched, published in zip(named[:7], newton_schulz._POLAR_EXPRESS, strict=False):
        for power, x in zip((1, 3, 5), published, strict=True):
            assert stretched[power // 2] == pytest.approx(x / 1.01**power)


@pytest.mark.parametrize(
    ("named", "steps", "low", "high"),
    [
        ("jordan", 5, 0.68, 1.21),
        ("polar_express", 5, 0.87, 1.125),
        ("polar_express", 6, 0.997, 1.01),
    ],
)
def test_singular_values_end_where_the_schema_says(
    named: str, steps: int, low: float, high: float
) -> None:
    config = muon(newton_schulz_coefficients=named, newton_schulz_steps=steps)
    found = reach(polynomials(config))
    assert low <= found[0] <= low + 0.02 and high - 0.02 <= found[1] <= high


def test_reach_of_one_linear_step() -> None:
    low, high, largest, lowest = reach(((2.0, 0.0, 0.0),))
    assert low == pytest.approx(0.06, rel=3e-3) and low >= 0.06
    assert (high, largest, lowest) == pytest.approx((2.02, 2.02, 2e-4))


GOOD = [[3.4445, -4.775, 2.0315]] * 5


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"schedule": [[1.0, 2.0]], "steps": 1}, ["schedule[0]", "[1.0, 2.0]", "three finite"]),
        (
            {"schedule": [*GOOD[:4], [3.0, math.nan, 1.0]]},
            ["schedule[4]", "nan", "three finite numbers"],
        ),
        ({"schedule": GOOD[:4]}, ["lists 4 steps", "newton_schulz_steps is 5"]),
        # Too few steps, a sign that turns, divergence, an overflow, a detour.
        ({"steps": 1}, ["newton_schulz_coefficients=jordan", "newton_schulz_steps=1", "0.103"]),
        ({"coefficients": "polar_express", "steps": 3}, ["polar_express", "1.87", "[0.4, 1.6]"]),
        (
            {"schedule": [*GOOD, [-0.05, 1.8, -0.7]], "steps": 6},
            ["schedule", "between 0.43", "smaller ones at -0.0", "above 0"],
        ),
        ({"schedule": [[3.4445, -4.775, 3.0315]] * 5}, ["schedule", "end in [0.4, 1.6]"]),
        ({"schedule": [[9.0, 1.0, 1.0]] * 5}, ["schedule", "inf"]),
        (
            {"schedule": [*GOOD, [8.0, 0.0, 0.0], [0.125, 0.0, 0.0]], "steps": 7},
            ["schedule", "on the way", "more than 4"],
        ),
    ],
)
def test_what_does_not_orthogonalise_is_refused(
    changes: dict[str, Any], fragments: list[str]
) -> None:
    found = list(problems(tiny({f"{MUON}_{key}": value for key, value in changes.items()}), 2))
    assert len(found) == 1
    for fragment in fragments:
        assert fragment in found[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": GOOD},
        {"coefficients": "polar_express"},
        {"steps": 3},
        {"coefficients": "polar_express", "steps": 4},
        {"schedule": [[3.4445, -4.775, 2.0315]] * 4 + [[1.875, -1.25, 0.375]]},
    ],
)
def test_what_orthogonalises_is_not(changes: dict[str, Any]) -> None:
    assert not list(problems(tiny({f"{MUON}_{key}": value for key, value in changes.items()}), 2))
