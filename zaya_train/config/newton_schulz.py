"""The polynomials of Muon's Newton-Schulz iteration: by name, and what they do to singular values.

A step turns every singular value s of a matrix, scaled into [0, 1], into a s + b s^3 + c s^5.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zaya_train.config.schema import MuonConfig

Polynomial = tuple[float, float, float]

JORDAN: Polynomial = (3.4445, -4.7750, 2.0315)
"""Of every step: kellerjordan.github.io/posts/muon."""

_POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""arXiv 2505.16932, Algorithm 1: each the best quintic for what the one before leaves of [1e-3, 1];
the last one of every further step."""
_SAFETY = 1.01
"""There: all but the last are stretched by it, for values that bf16 has rounded above 1."""

LEAST = 0.03
"""Singular values from here up, of a matrix of norm 1, must end in BAND; smaller ones may stay
behind, but end above zero and below its upper end."""
BAND = (0.4, 1.6)
MOST_ON_THE_WAY = 4.0
"""Of any singular value between steps: beyond it bf16 leaves nothing of the small ones."""
_POINTS = 4000


def polynomials(muon: MuonConfig) -> tuple[Polynomial, ...]:
    """One for each step; valid only where `newton_schulz_problems` finds nothing."""
    if muon.newton_schulz_schedule:
        return tuple((a, b, c) for a, b, c in muon.newton_schulz_schedule)
    steps = muon.newton_schulz_steps
    if muon.newton_schulz_coefficients == "jordan":
        return (JORDAN,) * steps
    last = _POLAR_EXPRESS[-1]
    first = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    return tuple((first + [last] * steps)[:steps])


def newton_schulz_problems(muon: MuonConfig) -> Iterator[str]:
    """Polynomials that do not orthogonalise, one line each."""
    key, listed = "optim.muon.newton_schulz_schedule", muon.newton_schulz_schedule
    for step, triple in enumerate(listed):
        if len(triple) != 3 or not all(map(math.isfinite, triple)):
            yield f"{key}[{step}]: {list(triple)} must be three finite numbers: a, b, c"
            return
    steps = muon.newton_schulz_steps
    if listed and len(listed) != steps:
        yield (
            f"{key}: lists {len(listed)} steps, optim.muon.newton_schulz_steps is {steps}; both "
            "must say the same"
        )
    elif steps > 0:
        name = f"optim.muon.newton_schulz_coefficients={muon.newton_schulz_coefficients}"
        yield from _not_converging(
            key if listed else f"{name}, newton_schulz_steps={steps}", polynomials(muon)
        )


def _not_converging(key: str, chosen: tuple[Polynomial, ...]) -> Iterator[str]:
    low, high, largest, lowest = reach(chosen)
    if not (BAND[0] <= low and high <= BAND[1] and lowest > 0):
        yield (
            f"{key}: singular values from {LEAST} to 1 end between {low:.3g} and {high:.3g}, and "
            f"smaller ones at {lowest:.2g} or more; they must end in {list(BAND)}, and above 0"
        )
    elif not largest <= MOST_ON_THE_WAY:
        yield (
            f"{key}: singular values reach {largest:.3g} on the way, more than {MOST_ON_THE_WAY:g}"
        )


@cache
def reach(chosen: tuple[Polynomial, ...]) -> tuple[float, float, float, float]:
    """Over singular values in (0, 1.01], which is 1 with its rounding: the lowest result from
    LEAST up, the highest of all, the largest magnitude after any step, the lowest of all."""
    low, high, largest, lowest = math.inf, -math.inf, 0.0, math.inf
    start, end = 1e-4, 1.01
    for point in range(_POINTS + 1):
        first = value = start * (end / start) ** (point / _POINTS)
        for a, b, c in chosen:
            square = value * value
            value *= a + square * (b + c * square)
            # NaN, of overflow, compares with nothing.
            largest = max(largest, abs(value)) if math.isfinite(value) else math.inf
        if not math.isfinite(value):
            return -math.inf, math.inf, math.inf, -math.inf
        high, lowest = max(high, value), min(lowest, value)
        low = min(low, value) if first >= LEAST else low
    return low, high, largest, lowest
