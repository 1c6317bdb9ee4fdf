"""What a Newton-Schulz iteration is made of."""

from __future__ import annotations

Polynomial = tuple[float, float, float]
"""(a, b, c): a step turns every singular value s into a s + b s^3 + c s^5."""
Polynomials = tuple[Polynomial, ...]
"""One for each step."""
