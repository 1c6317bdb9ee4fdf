"""Choosing a back end by name, without fallbacks."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch.profiler import record_function

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Implementation = TypeVar("Implementation", bound="Callable[..., Any]")
Choice = TypeVar("Choice")

RANGE = "zaya::"
"""Begins the names of the profiler's ranges."""


@dataclass
class _Profiling:
    active: bool = False


# Not a context variable: autograd's threads, which make activations again, would not see it.
_profiling = _Profiling()


@contextmanager
def named_in_profiles() -> Iterator[None]:
    """Within it every call of an operation is a range `zaya::OP` of torch's profiler."""
    _profiling.active = True
    try:
        yield
    finally:
        _profiling.active = False


def pick(op: str, table: Mapping[str, Implementation], name: str) -> Implementation:
    """The implementation called `name`; ValueError naming the op and its choices otherwise."""
    return named(op, chosen(op, table, name))


def chosen(op: str, table: Mapping[str, Choice], name: str) -> Choice:
    """As `pick`, for what is no call of the operation yet."""
    if name not in table:
        raise ValueError(f"kernels.{op}: no back end {name!r}; choose from {', '.join(table)}")
    return table[name]


def named(op: str, run: Implementation) -> Implementation:
    """`run`, as a range of the profiler within `named_in_profiles`."""
    if not _profiling.active:
        return run

    @wraps(run)
    def within(*arguments: Any, **keywords: Any) -> Any:
        with record_function(RANGE + op):
            return run(*arguments, **keywords)

    return cast("Implementation", within)
