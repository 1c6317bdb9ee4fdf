from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_train.data import order
from zaya_train.data.order import balanced_row, permutation, permuted, rows_left

SIZES = [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097]


@pytest.mark.parametrize("size", SIZES)
def test_permutation_reaches_every_item_once(size: int) -> None:
    assert sorted(permuted(i, size, 7, "phase") for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", SIZES)
def test_whole_permutation_equals_its_elements(size: int) -> None:
    assert permutation(size, 3, "x").tolist() == [permuted(i, size, 3, "x") for i in range(size)]


def test_names_and_epochs_change_the_order() -> None:
    orders = {
        tuple(permuted(i, 100, *names) for i in range(100))
        for names in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), ("0a",)]
    }
    assert len(orders) == 6


def test_order_is_that_of_earlier_versions() -> None:
    """Changing this order breaks the resume of every run that is under way."""
    assert [permuted(i, 10, 0, "phase", "source", 0) for i in range(10)] == GOLDEN


GOLDEN = [0, 9, 2, 1, 4, 6, 5, 3, 8, 7]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_takes_every_row_once_in_groups_of_neighbours(
    size: int, group: int, seed: int
) -> None:
    rows = [balanced_row(i, size, group, seed, "s") for i in range(4 * size)]
    for epoch in range(4):
        part = rows[epoch * size : (epoch + 1) * size]
        assert sorted(part) == list(range(size))
    straddled = 0
    for start in range(0, len(rows) - group + 1, group):
        spread = max(rows[start : start + group]) - min(rows[start : start + group])
        # Two windows of an epoch's ends at most lie between neighbours, each less than a group.
        assert spread < 3 * group
        straddled += spread >= group
    assert straddled <= 4 * 3


@pytest.mark.parametrize("size", [125, 128, 801])
def test_groups_are_counted_from_the_heaviest_row_and_epochs_meet_among_light_ones(
    size: int,
) -> None:
    """Packing makes the work of just these groups equal."""
    rows = np.array([balanced_row(i, size, 8, 5, "s") for i in range(8 * size)]).reshape(-1, 8)
    groups = [sorted(group) for group in rows.tolist() if max(group) >= size // 4 + 8]
    assert {tuple(size - 1 - row for row in group[::-1]) for group in groups} == {
        tuple(range(first, first + 8)) for first in range(0, size - size // 4 - 8, 8)
    }
    meeting = [rows[epoch * size // 8] for epoch in range(1, 8) if epoch * size % 8]
    assert all(group.max() - group.min() == 7 and group.max() < size // 4 for group in meeting)
    assert len({group.min() for group in meeting}) >= min(3, len(meeting))


@pytest.mark.parametrize(("num_rows", "group"), [(1, 1), (5, 8), (21, 4), (64, 8), (103, 8)])
def test_rows_left_are_those_that_the_rest_of_the_epoch_takes(num_rows: int, group: int) -> None:
    for ordinal in range(3 * num_rows):
        rest = range(ordinal, -(-ordinal // num_rows) * num_rows)
        expected = sorted(balanced_row(i, num_rows, group, 5, "s") for i in rest)
        found = np.flatnonzero(rows_left(ordinal, num_rows, group, 5, "s"))
        assert found.tolist() == expected


def test_rows_left_of_a_million_need_no_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(index: int, size: int, *names: object) -> int:
        calls.append(index)
        return permuted(index, size, *names)

    monkeypatch.setattr(order, "permuted", counted)
    assert rows_left(1_000_011, 1_000_003, 8, 5, "s").sum() == 999_995
    assert len(calls) < 100


def test_epochs_and_groups_are_shuffled() -> None:
    rows = np.array([balanced_row(i, 800, 8, 5, "s") for i in range(1600)])
    groups = rows.reshape(200, 8)
    assert (groups.max(axis=1) - groups.min(axis=1)).max() == 7
    assert not np.array_equal(groups[:100], groups[100:])
    assert abs(np.corrcoef(groups[:99, 0], groups[1:100, 0])[0, 1]) < 0.3
    assert len({tuple(group - group.min()) for group in groups}) > 50


def test_balanced_order_is_that_of_earlier_versions() -> None:
    """Changing this order breaks the resume of every run that is under way."""
    rows = [balanced_row(i, 11, 4, 0, "source", 4096) for i in range(22)]
    assert rows == BALANCED_GOLDEN


BALANCED_GOLDEN = [5, 4, 3, 6, 7, 10, 9, 8, 0, 1, 2, 0, 10, 9, 7, 8, 4, 5, 3, 6, 2, 1]


def test_order_looks_random() -> None:
    order = permutation(10_000, "statistics")
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert (np.diff(order) == 1).sum() < 20


@pytest.mark.parametrize("index", [-1, 5])
def test_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError):
        permuted(index, 5, "a")
