from __future__ import annotations

import numpy as np
import pytest

from zaya_train.data.order import permutation, permuted, shuffled_row

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


def test_shuffled_rows_take_every_row_once_an_epoch() -> None:
    rows = [shuffled_row(i, 13, 5, "p", "s") for i in range(39)]
    epochs = [rows[start : start + 13] for start in (0, 13, 26)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_looks_random() -> None:
    order = permutation(10_000, "statistics")
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert (np.diff(order) == 1).sum() < 20


@pytest.mark.parametrize("index", [-1, 5])
def test_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError):
        permuted(index, 5, "a")
