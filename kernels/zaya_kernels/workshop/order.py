"""The programs of interpreted launches in another order, or only some of them.

The interpreter runs a launch's programs one after the other, always in the same order, so what
depends on their order (sums by atomics, a program that reads what another one wrote) agrees from
run to run there and does not on a GPU. Run from the last program to the first, it does not agree.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from triton.runtime import interpreter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


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


@contextmanager
def programs_chosen(choose: Callable[[str, int], Sequence[int]]) -> Iterator[None]:
    """Within it a launch is interpreted for some programs alone: of its kernel's name and its
    number of programs `choose` makes their numbers, counted with the grid's last size fastest."""
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    usual = executor.__call__

    def some(self: Any, *arguments: Any, **keywords: Any) -> None:
        grid = (*self.grid, 1, 1)[:3]
        numbers = choose(self.fn.__name__, int(np.prod(grid)))
        set_dim, set_place = builder.set_grid_dim, builder.set_grid_idx

        def place(number: int, *_: int) -> None:
            set_place(*(int(i) for i in np.unravel_index(numbers[number], grid)))

        self.grid = (len(numbers),)
        builder.set_grid_dim, builder.set_grid_idx = lambda *_: set_dim(*grid), place
        try:
            usual(self, *arguments, **keywords)
        finally:
            builder.set_grid_dim, builder.set_grid_idx = set_dim, set_place

    executor.__call__ = some
    try:
        yield
    finally:
        executor.__call__ = usual
