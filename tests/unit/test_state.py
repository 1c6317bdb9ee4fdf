"""Counters of a run."""

from __future__ import annotations

import json

import pytest

from zaya_train.train.state import TrainState


def test_a_step_moves_every_counter_by_what_was_consumed() -> None:
    state = TrainState().after_step(4, 64, 200, True).after_step(2, 64, 90, False)
    assert state == TrainState(
        step=2,
        phase_index=0,
        phase_step=2,
        phase_rows=6,
        tokens=6 * 64,
        supervised_tokens=290,
        skipped_steps=1,
    )


def test_next_phase_resets_the_phases_counters_only() -> None:
    state = TrainState(10, 1, 4, 40, 2560, 2000, 2).next_phase()
    assert state == TrainState(10, 2, 0, 0, 2560, 2000, 2, past_rows=(40,))


def test_state_survives_json() -> None:
    state = TrainState(10, 1, 4, 40, 2**60, 2000, 2, past_rows=(7,))
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_a_record_with_a_counter_too_many_or_too_few_is_no_state() -> None:
    with pytest.raises(TypeError):
        TrainState.from_dict({**TrainState().to_dict(), "epoch": 1})
