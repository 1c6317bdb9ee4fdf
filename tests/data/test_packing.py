from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_train.data.packing import pack_best_fit, split_text

UNCAPPED = 1 << 30


@settings(max_examples=200)
@given(st.lists(st.integers(1, 33), max_size=120), st.integers(33, 70), st.integers(1, 9))
def test_every_document_once_within_capacity_and_cap(
    lengths: list[int], row_tokens: int, cap: int
) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    documents = np.arange(len(sizes)) + 1000
    packed = pack_best_fit(documents, sizes, row_tokens, cap)
    assert sorted(packed.documents.tolist()) == documents.tolist()
    for index in range(len(packed)):
        row = packed.row(index)
        assert 1 <= len(row) <= cap
        assert sizes[row - 1000].sum() <= row_tokens


@settings(max_examples=100)
@given(st.lists(st.integers(1, 33), min_size=1, max_size=80), st.integers(33, 65))
def test_any_two_rows_overflow_together(lengths: list[int], row_tokens: int) -> None:
    """Best fit opens a row only for a document that fits nowhere, so no two rows can merge."""
    sizes = np.array(lengths, dtype=np.int64)
    packed = pack_best_fit(np.arange(len(sizes)), sizes, row_tokens, UNCAPPED)
    fills = sorted(int(sizes[packed.row(i)].sum()) for i in range(len(packed)))
    assert len(fills) == 1 or fills[0] + fills[1] > row_tokens


def test_best_fit_takes_the_fullest_row_that_fits() -> None:
    sizes = np.array([6, 7, 3, 2])
    packed = pack_best_fit(np.arange(4), sizes, 10, UNCAPPED)
    assert [packed.row(i).tolist() for i in range(len(packed))] == [[1, 2], [0, 3]]


@pytest.mark.parametrize("row_tokens", [4096, 4097, 8193, 32_768, 131_072])
def test_lognormal_lengths_fill_rows(row_tokens: int) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(np.log(2000) - 0.5, 1.0, 20_000).astype(np.int64).clip(1, row_tokens)
    packed = pack_best_fit(np.arange(len(sizes)), sizes, row_tokens, UNCAPPED)
    lower_bound = -(-int(sizes.sum()) // row_tokens)
    assert len(packed) <= lower_bound * 1.002 + 2


@pytest.mark.parametrize("bad", [0, 11])
def test_length_outside_the_row_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="row of 10 tokens"):
        pack_best_fit(np.arange(2), np.array([5, bad]), 10, UNCAPPED)


@settings(max_examples=200)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(2, 50))
def test_text_rows_cover_every_token_in_order(lengths: list[int], row_tokens: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    documents = np.arange(len(sizes))[::-1]
    rows = split_text(documents, sizes[documents], row_tokens)
    seen: list[tuple[int, int]] = []
    for index in range(len(rows)):
        pieces = rows.row(index)
        size = sum(piece.end - piece.start for piece in pieces)
        assert size == row_tokens or index == len(rows) - 1
        assert all(piece.end > piece.start for piece in pieces)
        seen += [(piece.document, t) for piece in pieces for t in range(piece.start, piece.end)]
    expected = [(int(d), t) for d in documents for t in range(int(sizes[d]))]
    assert seen == expected[: len(seen)]
    left = expected[len(seen) :]
    assert all(position == sizes[document] - 1 for document, position in left)
    assert max(Counter(seen).values()) == 1


@pytest.mark.parametrize(
    ("lengths", "rows"), [([5, 4], 2), ([5, 5], 2), ([5, 6], 2), ([4, 3, 3, 2], 3), ([10], 2)]
)
def test_last_row_without_a_target_is_left_out(lengths: list[int], rows: int) -> None:
    """At 5 tokens a row, [5, 6] would leave one last token alone: nothing to predict from it."""
    assert len(split_text(np.arange(len(lengths)), np.array(lengths), 5)) == rows


def test_nothing_to_pack() -> None:
    empty = np.array([], dtype=np.int64)
    assert len(pack_best_fit(empty, empty, 8, 4)) == 0
    assert len(split_text(empty, empty, 8)) == 0
