from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_train.config.errors import DataError
from zaya_train.data.mixture import MAX_PERIOD_ROWS, MixtureSchedule, make_schedule

MIDTRAIN = {"cot": 86.1, "web": 5.7, "long": 0.8, "code": 3.0, "math": 3.0, "short": 1.4}


def errors(schedule: MixtureSchedule, weights: dict[str, float], rows: int) -> np.ndarray:
    """[sources, rows + 1] draws minus exact share after each number of rows."""
    drawn = [schedule.locate(index)[0] for index in range(rows)]
    total, steps = sum(weights.values()), np.arange(rows + 1)
    return np.array(
        [
            np.concatenate([[0], np.cumsum([name == source for name in drawn])])
            - steps * weight / total
            for source, weight in weights.items()
        ]
    )


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 60), min_size=1),
    st.integers(0, 5),
)
def test_within_one_row_at_every_index_and_two_over_any_window(
    weights: dict[str, int], seed: int
) -> None:
    share = {name: float(weight) for name, weight in weights.items()}
    deviation = errors(make_schedule(share, seed, "phase"), share, 600)
    assert np.abs(deviation).max() < 1
    assert (deviation.max(axis=1) - deviation.min(axis=1)).max() < 2


def test_published_mixture_is_exact_after_a_period() -> None:
    schedule = make_schedule(MIDTRAIN, 0, "midtrain")
    assert schedule.period == 1000
    counts = schedule.counts(3000)
    assert counts == {name: round(30 * weight) for name, weight in MIDTRAIN.items()}
    assert np.abs(errors(schedule, MIDTRAIN, 2500)).max() < 1


def test_draws_of_a_source_count_up_and_agree_with_counts() -> None:
    schedule = make_schedule(MIDTRAIN, 3, "p")
    seen: Counter[str] = Counter()
    for index in range(2345):
        if index % 97 == 0:
            assert schedule.counts(index) == {name: seen[name] for name in schedule.names}
        name, ordinal = schedule.locate(index)
        assert ordinal == seen[name]
        seen[name] += 1


def test_far_index_needs_no_walk() -> None:
    schedule = make_schedule({"a": 2, "b": 1}, 0)
    far = 3 * 10**15
    assert schedule.counts(far) == {"a": 2 * 10**15, "b": 10**15}
    assert schedule.locate(far)[1] in (2 * 10**15, 10**15)


def test_weights_without_a_short_period_are_rounded_to_the_resolution() -> None:
    weights = {"a": 1 / 3, "b": 0.1234567, "c": 2**0.5}
    schedule = make_schedule(weights, 0)
    assert schedule.period == MAX_PERIOD_ROWS
    total = sum(weights.values())
    for name, share in zip(schedule.names, schedule.shares, strict=True):
        assert abs(share - MAX_PERIOD_ROWS * weights[name] / total) < 1


def test_zero_weight_is_never_drawn() -> None:
    schedule = make_schedule({"a": 1.0, "never": 0.0}, 0)
    assert schedule.names == ("a",)


@pytest.mark.parametrize(
    ("weights", "rule"),
    [
        ({}, "sum to nothing"),
        ({"a": 0.0, "b": 0.0}, "sum to nothing"),
        ({"a": 1.0, "b": -0.5}, "-0.5 of 'b'"),
        ({"a": float("nan")}, "nan of 'a'"),
        ({"a": float("inf")}, "inf of 'a'"),
        ({"a": 1.0, "b": 1e-9}, "less than one row in"),
    ],
)
def test_bad_weights_are_named(weights: dict[str, float], rule: str) -> None:
    with pytest.raises(DataError, match=rule):
        make_schedule(weights, 0)


def test_only_ratios_of_weights_count() -> None:
    small, large = (make_schedule(w, 0) for w in ({"a": 0.25, "b": 0.75}, {"a": 2, "b": 6}))
    assert small.names == large.names and small.shares == large.shares
    assert small.chosen.tolist() == large.chosen.tolist()
