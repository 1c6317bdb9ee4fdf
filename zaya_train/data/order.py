"""Which row comes when: permutations computed element by element, in O(1) and without memory.

A permutation of n items is a Feistel network over the smallest even-bit domain that holds n,
walked until it lands inside (cycle walking, Black and Rogaway 2002). Keys come from SHA-256 of the
names, so an order depends on nothing but what is written in the call, on no library's generator.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Rows = TypeVar("_Rows", "int", "NDArray[np.int64]")
_ROUNDS = 6
_MASK = (1 << 64) - 1


def permuted(index: int, size: int, *names: object) -> int:
    """Image of `index` under the permutation of range(size) that `names` choose.

    Raises:
        IndexError: index outside range(size).
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} of a permutation of {size}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(names)
    while True:
        index = _feistel(index, half, keys)
        if index < size:
            return index


def permutation(size: int, *names: object) -> NDArray[np.int64]:
    """All of `permuted(range(size))` at once, [size]."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _round_keys(names)
    image = np.arange(size, dtype=np.uint64)
    pending = np.arange(size)
    while len(pending):
        image[pending] = _feistel_array(image[pending], half, keys)
        pending = pending[image[pending] >= size]
    return image.astype(np.int64)


def balanced_row(ordinal: int, num_rows: int, group: int, *names: object) -> int:
    """Row that a source's `ordinal`-th draw takes, of rows sorted by the work they make.

    Every epoch is a new permutation. In it `group` neighbours in work come one after the other, at
    ordinals that begin with a multiple of `group`, so that ranks that share them finish together;
    which group comes when is shuffled, and so is the order inside. Groups are counted from the row
    with the most work. A group that straddles two epochs is made of neighbours too, from a place
    among the lightest rows that moves from epoch to epoch: it shifts the groups below it, which
    costs least where there is least work.
    """
    epoch, position = divmod(ordinal, num_rows)
    head = -epoch * num_rows % group
    tail = (num_rows - head) % group
    if num_rows < group:
        return permuted(position, num_rows, *names, epoch)
    windows = _windows(epoch, num_rows, group, names)
    for window, begin in zip(windows, (0, num_rows - tail), strict=True):
        start, size = window
        if begin <= position < begin + size:
            return start + permuted(position - begin, size, *names, epoch, "single")
    number, place = divmod(position - head, group)
    groups = (num_rows - head - tail) // group
    from_top = permuted(number, groups, *names, epoch) * group
    from_top += permuted(place, group, *names, epoch, number)
    return _below_windows(num_rows - 1 - from_top, windows)


def _windows(
    epoch: int, num_rows: int, group: int, names: tuple[object, ...]
) -> list[tuple[int, int]]:
    """(first row, rows) of an epoch's parts of the groups that straddle its two ends."""
    head = -epoch * num_rows % group
    tail = (num_rows - head) % group
    if num_rows // 8 < group:
        return [(0, head), (head, tail)]
    first, last = _edge(epoch, num_rows, group, names), _edge(epoch + 1, num_rows, group, names)
    # Of a straddling group's neighbours the earlier epoch takes the lighter ones.
    return [(first + group - head, head), (last, tail)]


def _below_windows(rows: _Rows, windows: list[tuple[int, int]]) -> _Rows:
    """A row, or an array of them, counted from the top of those outside the windows."""
    for start, size in sorted(windows, reverse=True):
        rows = rows - size * (rows < start + size)
    return rows


def rows_left(ordinal: int, num_rows: int, group: int, *names: object) -> NDArray[np.bool_]:
    """[num_rows], True for rows that a source takes from its `ordinal`-th draw to the end of that
    epoch; none where `ordinal` begins one. As `balanced_row`, for whole groups at once."""
    epoch, position = divmod(ordinal, num_rows)
    left = np.zeros(num_rows, dtype=np.bool_)
    if not position:
        return left
    head = -epoch * num_rows % group
    groups = max(0, num_rows - head) // group if num_rows >= group else 0
    first = min(groups, max(0, -(-(position - head) // group)))
    begin, end = head + first * group, head + groups * group
    if first < groups:
        # The shuffle inside a group does not matter: all of it is left.
        starts = permutation(groups, *names, epoch)[first:] * group
        from_top = (starts[:, None] + np.arange(group)).ravel()
        left[_below_windows(num_rows - 1 - from_top, _windows(epoch, num_rows, group, names))] = 1
    else:
        begin = end = num_rows
    for place in (*range(position, begin), *range(end, num_rows)):
        left[balanced_row(epoch * num_rows + place, num_rows, group, *names)] = True
    return left


def _edge(epoch: int, num_rows: int, group: int, names: tuple[object, ...]) -> int:
    """First of `group` neighbours that stand where `epoch` begins.

    Those of two epochs in turn are apart: they lie in the lowest eighth of the rows and the next.
    """
    eighth = num_rows // 8
    return epoch % 2 * eighth + permuted(0, eighth - group + 1, *names, epoch, "edge")


@lru_cache(maxsize=256)
def _round_keys(names: tuple[object, ...]) -> tuple[int, ...]:
    text = "\x1f".join(str(name) for name in names)
    digest = b"".join(
        hashlib.sha256(f"{block}\x1f{text}".encode()).digest() for block in range(_ROUNDS // 4 + 1)
    )
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _feistel(value: int, half_bits: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _feistel_array(
    values: NDArray[np.uint64], half_bits: int, keys: tuple[int, ...]
) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        mixed = right ^ np.uint64(key)
        mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ mixed >> np.uint64(31)) & mask)
    return left << bits | right
