"""Which source a global sample index draws from: a periodic schedule, exact at every index.

Weights are read as the decimals the user wrote, so 86.1 : 5.7 : ... has a short exact period;
weights without one of at most 65,536 rows are rounded to that resolution, largest remainders first.
Inside a period Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980)
picks the source. It keeps every source within less than one row of its exact share at every index,
and so within less than two rows over any window that starts elsewhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING

import numpy as np

from zaya_train.config.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MAX_PERIOD_ROWS = 1 << 16


@dataclass(frozen=True, eq=False)
class MixtureSchedule:
    """Draws of one phase; `shares` are rows per `period`, summing to it."""

    names: tuple[str, ...]
    shares: tuple[int, ...]
    chosen: NDArray[np.int32] = field(repr=False)
    """[period] source number per row of a period."""
    drawn: NDArray[np.int32] = field(repr=False)
    """[period] earlier draws of the chosen source within the period."""

    @property
    def period(self) -> int:
        """Rows after which the pattern repeats."""
        return len(self.chosen)

    def locate(self, index: int) -> tuple[str, int]:
        """Source of global sample `index` and which draw of that source it is, both from 0."""
        if index < 0:
            raise IndexError(f"global sample index {index} is negative")
        cycle, position = divmod(index, self.period)
        source = int(self.chosen[position])
        return self.names[source], cycle * self.shares[source] + int(self.drawn[position])

    def counts(self, index: int) -> dict[str, int]:
        """Draws of every source among global samples 0 to index - 1."""
        cycle, position = divmod(index, self.period)
        part = np.bincount(self.chosen[:position], minlength=len(self.names))
        return {
            name: cycle * share + int(extra)
            for name, share, extra in zip(self.names, self.shares, part, strict=True)
        }


def make_schedule(weights: Mapping[str, float], *names: object) -> MixtureSchedule:
    """Schedule for `weights`; `names` (seed, phase) settle ties between equal claims.

    Sources of weight zero are never drawn and not listed.

    Raises:
        DataError: negative or non-finite weight, weights that sum to nothing, or one too small
            beside the others to be drawn once in MAX_PERIOD_ROWS.
    """
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise DataError(f"mixture: weight {weight} of {name!r} is not a finite number >= 0")
    positive = {name: weight for name, weight in weights.items() if weight > 0}
    if not positive:
        raise DataError(f"mixture: the weights of {sorted(weights)} sum to nothing")
    ranked = sorted(positive, key=lambda name: _tie_break(name, names))
    shares = _row_shares({name: positive[name] for name in ranked})
    chosen = _tijdeman(shares)
    drawn = np.empty_like(chosen)
    for source in range(len(shares)):
        places = np.flatnonzero(chosen == source)
        drawn[places] = np.arange(len(places))
    return MixtureSchedule(tuple(ranked), tuple(shares), chosen, drawn)


def _tie_break(name: str, names: tuple[object, ...]) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, (*names, name))).encode()).digest()


def _row_shares(weights: Mapping[str, float]) -> list[int]:
    """Rows per period for each weight: exact where the period allows it."""
    exact = [Fraction(str(weight)) for weight in weights.values()]
    total = sum(exact)
    parts = [weight / total for weight in exact]
    period = lcm(*(part.denominator for part in parts))
    if period <= MAX_PERIOD_ROWS:
        return [int(part * period) for part in parts]
    shares = [int(part * MAX_PERIOD_ROWS) for part in parts]
    remainders = [part * MAX_PERIOD_ROWS - share for part, share in zip(parts, shares, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda i: -remainders[i])
    for source in by_remainder[: MAX_PERIOD_ROWS - sum(shares)]:
        shares[source] += 1
    for name, share in zip(weights, shares, strict=True):
        if not share:
            raise DataError(
                f"mixture: weight {weights[name]} of {name!r} is less than one row in "
                f"{MAX_PERIOD_ROWS}"
            )
    return shares


def _tijdeman(shares: list[int]) -> NDArray[np.int32]:
    """Sources in an order that keeps |draws - share| <= 1 - 1 / (2n - 2) at every index.

    Exact in integers: with period P, source i has claim share_i * (t + 1) - P * draws_i after t
    draws. Eligible are claims of at least P / (2n - 2); the one due first is taken.
    """
    period, count = sum(shares), len(shares)
    scale = max(2 * count - 2, 1)
    limit = period * (scale - 1)
    drawn = [0] * count
    chosen = np.empty(period, dtype=np.int32)
    for step in range(period):
        best, best_slack = -1, 0
        for source, share in enumerate(shares):
            claim = scale * (share * (step + 1) - period * drawn[source])
            if claim < period and count > 1:
                continue
            slack = limit - claim
            if best < 0 or slack * shares[best] < best_slack * share:
                best, best_slack = source, slack
        chosen[step] = best
        drawn[best] += 1
    return chosen
