"""Which documents share a row: best-fit-decreasing over the whole corpus.

Small sets, where single rows count, are also packed with a look ahead; the fewer rows win.

Equal lengths are placed together: a row with room for q documents of the length at hand takes them
one after the other, for it stays the fullest row that fits. Work grows with distinct lengths and
rows rather than with documents.

Rows are shared out in groups of neighbours in work (see `order.balanced_row`). Thousands of rows
have such neighbours; of few rows best fit leaves the first with the longest documents and the last
with none of them. Small sets are therefore packed once more, group by group, each document into the
row of its group with the least work; taken where that needs no row more.

A cap on documents per row would leave the short ones, which come last, in half-empty rows of their
own. Where it binds, short documents are dealt evenly to all rows first, and only the shortest are
kept back to fill the gaps at the end.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_FILLERS_PER_ROW = 8
"""Shortest documents kept back per row when the cap binds, to close the gaps the others leave."""
_SLACK_BITS = 10
"""Room for them is 1/1024 of a row less than they need, for the rows filled first to take more of
the others; measured best of 1/512, 1/1024, 1/2048 and none at 131,072 tokens and 256 documents."""


_LOOKAHEAD_DOCUMENTS = 10_000
"""Up to so many documents, where a row is worth 0.01 points and more, a slower search is tried."""
_LOOKAHEAD_WIDTH = 400
"""Documents it looks at for each choice; real traces at 4,096 tokens: 886 rows by best fit alone,
885 with 64, 884 with 400; the lower bound is 883."""


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


@dataclass
class _Bins:
    """Rows being filled, found by their free tokens."""

    row_tokens: int
    max_documents: int
    counts: list[int] = field(default_factory=list)
    """Documents in every row."""
    free_sizes: list[int] = field(default_factory=list)
    """Sorted; the keys of `rows_by_free`."""
    rows_by_free: dict[int, list[int]] = field(default_factory=dict)
    capped: bool = False
    """Whether some row had room left when it reached the cap."""

    def open(self, free: int, count: int) -> int:
        """A new row that already holds `count` documents."""
        self.counts.append(count)
        row = len(self.counts) - 1
        self._offer(free, [row])
        return row

    def place(self, length: int, number: int) -> list[int]:
        """Rows for `number` documents of one length, best fit first."""
        placed: list[int] = []
        while number > len(placed):
            left = number - len(placed)
            position = bisect_left(self.free_sizes, length)
            if position == len(self.free_sizes):
                self._open_for(length, left)
                continue
            free = self.free_sizes[position]
            rows = self.rows_by_free[free]
            if free < 2 * length:
                taken = rows[-left:][::-1]
                del rows[-left:]
                self._drop_if_empty(free, position)
                self._put(taken, 1, free - length)
                placed += taken
                continue
            row = rows.pop()
            self._drop_if_empty(free, position)
            times = min(free // length, left, self.max_documents - self.counts[row])
            self._put([row], times, free - times * length)
            placed += [row] * times
        return placed

    def _open_for(self, length: int, number: int) -> None:
        """As many empty rows as documents of this length still need."""
        per_row = min(self.row_tokens // length, self.max_documents)
        first, count = len(self.counts), -(-number // per_row)
        self.counts += [0] * count
        self._offer(self.row_tokens, list(range(first, first + count))[::-1])

    def _put(self, rows: list[int], times: int, free: int) -> None:
        counts = self.counts
        for row in rows:
            counts[row] += times
        if not free:
            return
        # The cap can only bind on rows this full of documents; most corpora never get there.
        open_rows = [row for row in rows if counts[row] < self.max_documents]
        if len(open_rows) < len(rows):
            self.capped = True
        if open_rows:
            self._offer(free, open_rows[::-1])

    def _offer(self, free: int, rows: list[int]) -> None:
        if not free:
            return
        if free in self.rows_by_free:
            self.rows_by_free[free] += rows
        else:
            insort(self.free_sizes, free)
            self.rows_by_free[free] = rows

    def _drop_if_empty(self, free: int, position: int) -> None:
        if not self.rows_by_free[free]:
            del self.rows_by_free[free], self.free_sizes[position]


def pack_best_fit(
    documents: Indices, lengths: Indices, row_tokens: int, max_documents: int, group: int = 1
) -> PackedRows:
    """Best-fit-decreasing: longest first, each into the fullest row that still takes it.

    Args:
        documents: [n] indices to place.
        lengths: [n] their lengths, 1 to row_tokens.
        row_tokens: capacity of a row.
        max_documents: cap on documents in a row, at least 1.
        group: rows that are to make equal attention work (sum of squared lengths); 1: any.

    Returns:
        Rows in the order they were opened, so the longest documents come first: shuffle on use.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= row_tokens:
        raise ValueError(
            f"lengths {int(lengths.min())} to {int(lengths.max())}, row of {row_tokens} tokens"
        )
    if max_documents < 1:
        raise ValueError(f"max_documents is {max_documents}, at least 1 expected")
    # Sorting keys of few bits is a radix sort; ties stay in document order.
    keys = (row_tokens - lengths).astype(np.uint16 if row_tokens < 1 << 16 else np.int64)
    order = np.argsort(keys, kind="stable")
    bins = _Bins(row_tokens, max_documents)
    row_of = _fill(bins, lengths[order])
    if bins.capped:
        spread = _spread(lengths[order], row_tokens, max_documents)
        if spread.max() < row_of.max():
            row_of = spread
    fewest = -(-int(lengths.sum()) // row_tokens) if len(lengths) else 0
    if len(lengths) <= _LOOKAHEAD_DOCUMENTS and len(lengths) and row_of.max() >= fewest:
        ahead = _look_ahead(lengths[order], row_tokens, max_documents)
        if ahead.max() < row_of.max():
            row_of = ahead
    if group > 1 and 0 < len(lengths) <= _LOOKAHEAD_DOCUMENTS:
        rows = int(row_of.max()) + 1
        even = _by_groups(lengths[order], row_tokens, max_documents, _sizes(rows, group))
        row_of = row_of if even is None else even
    return _collect(documents[order], row_of)


def _fill(bins: _Bins, lengths: Indices) -> Indices:
    """Row of every document of `lengths`, which fall."""
    values, counts = _runs(lengths)
    placed: list[int] = []
    for length, number in zip(values.tolist(), counts.tolist(), strict=True):
        placed += bins.place(length, number)
    return np.array(placed, dtype=np.int64)


def _runs(lengths: Indices) -> tuple[Indices, Indices]:
    """Distinct values of a monotonous array in its order, and how often each stands there."""
    starts = np.flatnonzero(np.diff(lengths, prepend=-1))
    return lengths[starts], np.diff(starts, append=len(lengths))


def _spread(lengths: Indices, row_tokens: int, max_documents: int) -> Indices:
    """Row of each of the falling `lengths`, for a cap that binds: short documents to all rows.

    Short are those of which half of `max_documents` do not fill a row. As many rows are opened as
    could hold everything. Documents that leave no room for a share of short ones stand alone at
    first; every other row is given its share of the short ones, and room for its share of the very
    shortest, which are kept back to close the gaps. Where these rows are too few for the cap or for
    the tokens of the shares, best fit it is.
    """
    number = len(lengths)
    rows = max(-(-int(lengths.sum()) // row_tokens), -(-number // max_documents))
    short = int(np.searchsorted(-lengths, -(2 * row_tokens // max_documents)))
    last = max(short, number - rows * _FILLERS_PER_ROW)
    # Twice the mean, for the rows of long documents take no share.
    alone = int(np.searchsorted(-lengths, -(row_tokens - 2 * int(lengths[short:].sum()) // rows)))
    if alone >= min(rows, short):
        return _fill(_Bins(row_tokens, max_documents), lengths)
    dealt = alone + _dealt(last - short, rows - alone)
    share = int(lengths[last:].sum()) // (rows - alone)
    reserve = max(0, share - (row_tokens >> _SLACK_BITS))
    held = np.concatenate([np.arange(alone), dealt])
    sizes = np.concatenate([lengths[:alone], lengths[short:last]])
    room = np.full(rows, row_tokens - reserve)
    room[:alone] = row_tokens
    most = int(np.bincount(held).max(initial=0))
    if most > max_documents or (np.bincount(held, sizes, rows) > room).any():
        return _fill(_Bins(row_tokens, max_documents), lengths)
    bins = _reopened(held, sizes, room, max_documents)
    middle = _fill(bins, lengths[alone:short])
    held, sizes = np.append(held, middle), np.append(sizes, lengths[alone:short])
    room = np.full(len(bins.counts), row_tokens)
    fillers = _fill(_reopened(held, sizes, room, max_documents), lengths[last:])
    return np.concatenate([np.arange(alone), middle, dealt, fillers])


def _dealt(number: int, rows: int) -> Indices:
    """Rows of documents dealt one by one; every other round runs backwards, so that the rows'
    shares of tokens differ little."""
    rounds, place = np.divmod(np.arange(number), rows)
    return np.where(rounds % 2, rows - 1 - place, place)


def _look_ahead(lengths: Indices, row_tokens: int, max_documents: int) -> Indices:
    """Packing of falling `lengths` row by row, with a look at what comes after.

    A row begins with the longest document left and takes, again and again, the first of the pair of
    documents that together leave the least room, until nothing fits.
    """
    left = lengths[::-1].tolist()
    places = list(range(len(lengths)))[::-1]
    row_of = np.empty(len(lengths), dtype=np.int64)
    row = 0
    while left:
        free, count = row_tokens - left.pop(), 1
        row_of[places.pop()] = row
        while left and left[0] <= free and count < max_documents:
            chosen = _first_of_best_pair(left, free)
            free, count = free - left.pop(chosen), count + 1
            row_of[places.pop(chosen)] = row
        row += 1
    return row_of


def _sizes(rows: int, group: int) -> list[int]:
    """Rows of every group, the one of the shortest documents last."""
    return [group] * (rows // group) + [rows % group] * (rows % group > 0)


def _by_groups(
    lengths: Indices, row_tokens: int, max_documents: int, sizes: list[int]
) -> Indices | None:
    """Rows of falling `lengths`, filled group by group; None where these rows do not hold them.

    A group gives the longest document left that fits to its row with the least work and some room,
    again and again. Where only its heaviest row has room, that is filled with the shortest ones.
    """
    left = lengths[::-1].tolist()
    places = list(range(len(lengths)))[::-1]
    row_of = np.empty(len(lengths), dtype=np.int64)
    first = 0
    for size in sizes:
        free, work, count = [row_tokens] * size, [0] * size, [0] * size
        while left and left[0] <= max(free):
            row = min((r for r in range(size) if free[r] >= left[0]), key=work.__getitem__)
            chosen = bisect_right(left, free[row]) - 1
            if work[row] == max(work) and min(free) < left[0]:
                chosen = 0
            length = left.pop(chosen)
            row_of[places.pop(chosen)] = first + row
            work[row] += length * length
            count[row] += 1
            free[row] = free[row] - length if count[row] < max_documents else 0
        first += size
    return None if left else row_of


def _first_of_best_pair(lengths: list[int], free: int) -> int:
    """Place in rising `lengths` of the longer document of the pair that fills `free` best."""
    top = bisect_right(lengths, free)
    best, chosen, seen = -1, top - 1, -1
    for place in range(top - 1, max(-1, top - 1 - _LOOKAHEAD_WIDTH), -1):
        length = lengths[place]
        if length == seen:
            continue
        seen = length
        other = min(bisect_right(lengths, free - length), place) - 1
        filled = length + (lengths[other] if other >= 0 else 0)
        if filled > best:
            best, chosen = filled, place
        if filled == free:
            break
    return chosen


def _reopened(row_of: Indices, lengths: Indices, room: Indices, max_documents: int) -> _Bins:
    """Rows of `room` tokens each that already hold what `row_of` and `lengths` say."""
    bins = _Bins(int(room.max()), max_documents)
    used = np.bincount(row_of, weights=lengths, minlength=len(room)).astype(np.int64)
    counts = np.bincount(row_of, minlength=len(room))
    for free, count in zip((room - used).tolist(), counts.tolist(), strict=True):
        bins.open(free if count < max_documents else 0, count)
    return bins


def _collect(documents: Indices, row_of: Indices) -> PackedRows:
    order = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of)
    return PackedRows(documents[order], np.concatenate([[0], np.cumsum(counts)]))
