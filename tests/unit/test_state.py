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
        skipped_in_a_row=1,
        streak_first_row=4,
    )


def test_a_streak_of_skipped_steps_knows_its_length_and_its_first_row() -> None:
    state = TrainState(phase_rows=8)
    for length in (1, 2, 3):
        state = state.after_step(4, 64, 200, False)
        assert (state.skipped_in_a_row, state.streak_first_row) == (length, 8)
    state = state.after_step(4, 64, 200, True)
    assert (state.skipped_in_a_row, state.streak_first_row, state.skipped_steps) == (0, 0, 3)


def test_rows_to_avoid_are_no_part_of_a_streak() -> None:
    state = TrainState(phase_rows=4, avoided=((4, 12),))
    seen = []
    for _ in range(3):
        seen.append(state.avoids)
        state = state.after_step(4, 64, 200, not state.avoids)
        assert state.skipped_in_a_row == 0
    assert seen == [True, True, False]
    assert (state.skipped_in_a_row, state.skipped_steps) == (0, 2)


def test_next_phase_resets_the_phases_counters_only() -> None:
    state = TrainState(10, 1, 4, 40, 2560, 2000, 2, (), 1, 36, (0.5,), ((4, 8),))
    after = state.next_phase({"skip_rate": 0.1})
    assert after == TrainState(
        10, 2, 0, 0, 2560, 2000, 2, past_rows=(40,), measured={"skip_rate": 0.1}
    )


def test_state_survives_json() -> None:
    state = TrainState(
        10, 1, 4, 40, 2**60, 2000, 2, (7,), 1, 36, (0.1, 1 / 3), ((4, 8),), {"skip_rate": 0.1}
    )
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_a_record_with_a_counter_too_many_or_too_few_is_no_state() -> None:
    with pytest.raises(TypeError):
        TrainState.from_dict({**TrainState().to_dict(), "epoch": 1})


def test_a_record_from_before_the_guard_starts_its_window_anew() -> None:
    old = TrainState(10, 1, 4, 40, 2560, 2000, 2).to_dict()
    for key in ("skipped_in_a_row", "streak_first_row", "norms", "avoided", "measured"):
        del old[key]
    assert TrainState.from_dict(old) == TrainState(10, 1, 4, 40, 2560, 2000, 2)
