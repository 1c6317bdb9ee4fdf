"""The programs of interpreted launches in another order.

The interpreter runs a launch's programs one after the other, always in the same order, so what
depends on their order (sums by atomics, a program that reads what another one wrote) agrees from
run to run there and does not on a GPU. Run from the last program to the first, it does not agree.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from triton.runtime import interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def programs_reversed() -> Iterator[None]:
    """Within it every launch is interpreted from its last program to its first."""
    builder = interpreter.interpreter_builder
    usual = builder.set_grid_idx

    def from_the_end(*place: int) -> None:
        usual(*(size - 1 - i for size, i in zip(builder.grid_dim, place, strict=True)))

    builder.set_grid_idx = from_the_end
    try:
        yield
    finally:
        builder.set_grid_idx = usual
