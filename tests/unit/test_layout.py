from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_train.model import SequenceLayout

from ..helpers.models import CPU, packed

documents = st.lists(
    st.lists(st.integers(1, 12), min_size=1, max_size=5).filter(lambda row: sum(row) <= 24),
    min_size=1,
    max_size=3,
)


def test_positions_and_padding() -> None:
    layout = packed([[3, 1, 2], [8]], 8)
    assert layout.positions.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], list(range(8))]
    assert layout.valid.tolist() == [[True] * 6 + [False] * 2, [True] * 8]


def test_segments_are_the_documents() -> None:
    layout = packed([[3, 1, 2], [8]], 8)
    assert layout.attention.segments.tolist() == [
        [0, 3, 0, 3],
        [3, 1, 3, 1],
        [4, 2, 4, 2],
        [6, 2, 6, 2],
        [8, 8, 8, 8],
    ]
    assert not layout.attention.whole_rows


@pytest.mark.parametrize(
    ("lengths", "whole"), [([[8], [8]], True), ([[8], [7]], False), ([[4, 4], [8]], False)]
)
def test_whole_rows_need_no_gathering(lengths: list[list[int]], whole: bool) -> None:
    assert packed(lengths, 8).attention.whole_rows == whole
    assert SequenceLayout.whole_rows(2, 8, CPU).attention.whole_rows


def test_chunks_of_a_row() -> None:
    """Head and tail of a row of 16: the second document straddles the first cut, starts before the
    second chunk, and the third one starts within it."""
    layout = SequenceLayout.of_documents([[3, 11, 2]], 16, CPU, [(0, 4), (12, 16)])
    assert layout.positions.tolist() == [[0, 1, 2, 0, 9, 10, 0, 1]]
    assert layout.attention.segments.tolist() == [
        [0, 3, 0, 3],
        [3, 1, 3, 1],
        [4, 2, 3, 11],
        [6, 2, 14, 2],
    ]
    assert not layout.attention.whole_rows


def test_chunks_beyond_the_documents_are_padding() -> None:
    layout = SequenceLayout.of_documents([[5], [16]], 16, CPU, [(4, 8), (8, 12)])
    assert layout.valid.tolist() == [[True] + [False] * 7, [True] * 8]
    assert layout.positions[0].tolist() == [4, 0, 1, 2, 3, 4, 5, 6]


def test_a_row_in_one_chunk_is_the_row() -> None:
    plain = SequenceLayout.of_documents([[3, 5]], 8, CPU)
    chunked = SequenceLayout.of_documents([[3, 5]], 8, CPU, [(0, 8)])
    assert torch.equal(plain.positions, chunked.positions)
    assert torch.equal(plain.attention.segments, chunked.attention.segments)


@settings(max_examples=60, deadline=None)
@given(documents, st.sampled_from([1, 2, 3, 4]))
def test_ranks_together_hold_the_row(lengths: list[list[int]], ranks: int) -> None:
    """Head-tail chunks over 1 to 4 ranks: positions and validity are those of the whole row, and
    every token's keys are its document up to itself."""
    whole = packed(lengths, 24)
    size = 24 // (2 * ranks)
    for rank in range(ranks):
        first, last = rank, 2 * ranks - 1 - rank
        chunks = [(c * size, (c + 1) * size) for c in (first, last)]
        layout = SequenceLayout.of_documents(lengths, 24, CPU, chunks)
        local = torch.cat([torch.arange(*chunk) for chunk in chunks])
        assert torch.equal(layout.positions, whole.positions[:, local])
        assert torch.equal(layout.valid, whole.valid[:, local])
        for query, count, key, keys in layout.attention.segments.tolist():
            row, place = divmod(query, 2 * size)
            start = row * 24 + int(local[place])
            assert key + keys == start + count
            assert key == start - int(whole.positions[row, local[place]])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([[5, 4]], "documents of 9 tokens in a row of 8"),
        ([[8], [9]], "documents of 9 tokens in a row of 8"),
        ([[3, 0, 5]], "a document of 0 tokens"),
        ([[-1]], "a document of -1 tokens"),
    ],
)
def test_impossible_documents_are_refused(lengths: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed(lengths, 8)
