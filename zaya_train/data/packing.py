"""Which documents share a row: best-fit-decreasing for conversations, concat-and-split for text.

Plans hold indices only and are made once per (corpus, context); they cost about 0.2 s per 100,000
documents. Rows are planned over the whole corpus, not over windows of it, which is what keeps long
rows full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Whole documents per row: row r holds documents[offsets[r]:offsets[r + 1]]."""

    documents: Indices
    offsets: Indices

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Indices:
        """Document indices of one row."""
        return self.documents[self.offsets[index] : self.offsets[index + 1]]


class Piece(NamedTuple):
    """Tokens [start, end) of a document."""

    document: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class TextRows:
    """Rows cut every `row_tokens` from documents laid end to end in the order of `documents`.

    `ends` [n] are running token totals; `num_rows` may leave out a last row without targets.
    """

    documents: Indices
    ends: Indices
    row_tokens: int
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def row(self, index: int) -> list[Piece]:
        """Pieces of one row in order; a document cut by a row's end goes on in the next row."""
        begin = index * self.row_tokens
        stop = min(begin + self.row_tokens, int(self.ends[-1]))
        first = int(np.searchsorted(self.ends, begin, side="right"))
        pieces = []
        while begin < stop:
            document_start = int(self.ends[first - 1]) if first else 0
            end = min(stop, int(self.ends[first]))
            if end > begin:
                document = int(self.documents[first])
                pieces.append(Piece(document, begin - document_start, end - document_start))
            begin, first = end, first + 1
        return pieces


def pack_best_fit(
    documents: Indices, lengths: Indices, row_tokens: int, max_documents: int
) -> PackedRows:
    """Best-fit-decreasing: longest first, each into the fullest row that still takes it.

    Args:
        documents: [n] indices to place.
        lengths: [n] their lengths, 1 to row_tokens.
        row_tokens: capacity of a row.
        max_documents: cap on documents in a row.

    Returns:
        Rows in the order they were opened, so the longest documents come first: shuffle on use.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= row_tokens:
        raise ValueError(
            f"lengths {int(lengths.min())} to {int(lengths.max())}, row of {row_tokens} tokens"
        )
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    free_sizes: list[int] = []
    rows_by_free: dict[int, list[int]] = {}
    for place, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        position = bisect_left(free_sizes, length)
        if position == len(free_sizes):
            row, free = len(rows), row_tokens
            rows.append([])
        else:
            free = free_sizes[position]
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                del rows_by_free[free], free_sizes[position]
        rows[row].append(place)
        free -= length
        if free and len(rows[row]) < max_documents:
            if free not in rows_by_free:
                insort(free_sizes, free)
                rows_by_free[free] = []
            rows_by_free[free].append(row)
    counts = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    flat = np.fromiter((place for row in rows for place in row), dtype=np.int64, count=len(order))
    return PackedRows(documents[flat], np.concatenate([[0], np.cumsum(counts)]))


def split_text(documents: Indices, lengths: Indices, row_tokens: int) -> TextRows:
    """Concat-and-split of `documents` [n] with `lengths` [n], in the order given.

    A last, partial row counts unless it has no target, that is, unless each of its pieces is one
    last token of a document.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    num_rows = -(-total // row_tokens)
    if num_rows:
        begin = (num_rows - 1) * row_tokens
        closed = len(ends) - int(np.searchsorted(ends, begin, side="right"))
        num_rows -= closed == total - begin
    return TextRows(documents, ends, row_tokens, int(num_rows))
