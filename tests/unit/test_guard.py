"""Which gradient norms are spikes, and what is written down."""

from __future__ import annotations

import json
import math
import random

import pytest

from zaya_train.config.faults import GuardConfig
from zaya_train.train.guard import norm_limit, remember, why_skipped
from zaya_train.train.state import TrainState

NAN, INF = math.nan, math.inf


def test_the_limit_is_mean_and_deviations_by_hand() -> None:
    config = GuardConfig(sigma=6.0, window_steps=4)
    # Mean 2, deviation 1.
    assert norm_limit([1.0, 3.0, 1.0, 3.0], config) == 8.0
    assert norm_limit([1.0, 3.0, 1.0, 3.0], GuardConfig(sigma=2.0, window_steps=4)) == 4.0


def test_equal_norms_leave_room() -> None:
    config = GuardConfig(sigma=6.0, window_steps=4)
    assert norm_limit([2.0] * 4, config) == pytest.approx(2.0 + 6 * 0.05 * 2.0)


def test_nothing_is_a_spike_before_half_the_window_is_there() -> None:
    config = GuardConfig(window_steps=8)
    assert norm_limit([1.0] * 3, config) == INF
    assert norm_limit([1.0] * 4, config) < INF
    assert norm_limit([1.0] * 8, GuardConfig(sigma=0.0, window_steps=8)) == INF


@pytest.mark.parametrize(
    ("loss", "norm", "why"),
    [
        (1.0, 5.0, ""),
        (1.0, 5.000001, "gradient spike"),
        (1.0, NAN, "gradient not finite"),
        (1.0, INF, "gradient not finite"),
        (NAN, 1.0, "loss not finite"),
        (-INF, NAN, "loss not finite"),
    ],
)
def test_why_a_step_is_skipped(loss: float, norm: float, why: str) -> None:
    assert why_skipped(loss, norm, 5.0) == why
    assert why_skipped(loss, norm, INF) == ("" if why == "gradient spike" else why)


def test_the_window_keeps_the_newest_norms() -> None:
    state = TrainState()
    for norm in range(10):
        state = remember(state, float(norm), GuardConfig(window_steps=4))
    assert state.norms == (6.0, 7.0, 8.0, 9.0)


def test_a_resumed_window_decides_bit_for_bit_as_before() -> None:
    config = GuardConfig(window_steps=32)
    generator, state = random.Random(1), TrainState()
    for _ in range(100):
        state = remember(state, generator.lognormvariate(0, 0.3), config)
        again = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
        assert norm_limit(again.norms, config).hex() == norm_limit(state.norms, config).hex()


def test_six_deviations_alarm_on_a_spike_and_not_on_noise() -> None:
    config, generator = GuardConfig(), random.Random(2)
    state, alarms = TrainState(), 0
    for _ in range(5000):
        norm = generator.lognormvariate(0, 0.2)
        alarms += bool(why_skipped(1.0, norm, norm_limit(state.norms, config)))
        state = remember(state, norm, config)
    assert alarms == 0
    assert why_skipped(1.0, 4.0, norm_limit(state.norms, config)) == "gradient spike"
