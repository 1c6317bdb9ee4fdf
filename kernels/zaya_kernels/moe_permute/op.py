"""Tokens to their experts' order and back, top-1.

Four steps, none of which waits for the device: count, sort, gather, scatter. The middle ones are
apart so that others can be told the counts while tokens are sorted, and experts run in between.

Legend: T tokens, E experts, C = E + 1 classes, the last of which has no expert, R rows, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_kernels.backends import chosen, named
from zaya_kernels.moe_permute import eager, native, reference
from zaya_kernels.moe_permute.types import Order

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from zaya_kernels.moe_permute.types import Load


_OP = "moe_permute"


@dataclass(frozen=True)
class _Backend:
    count: Callable[[Tensor, int], Load]
    sort: Callable[[Load], Tensor]
    gather: Callable[[Tensor, Order], tuple[Tensor, Tensor]]
    rest: Callable[[Tensor, Order], Tensor]
    scatter: Callable[[Tensor, Order, Tensor | None, Tensor | None], Tensor]


def _triton() -> _Backend:
    from zaya_kernels.moe_permute import triton

    return _Backend(triton.count, triton.sort, triton.gather, triton.rest, triton.scatter)


BACKENDS: dict[str, Callable[[], _Backend]] = {
    "eager": lambda: _Backend(eager.count, eager.sort, eager.gather, eager.rest, eager.scatter),
    "native": lambda: _Backend(
        native.count, native.sort, native.gather, native.rest, native.scatter
    ),
    "reference": lambda: _Backend(
        reference.count, reference.sort, reference.gather, reference.rest, reference.scatter
    ),
    "triton": _triton,
}


def _of(name: str) -> _Backend:
    return chosen(_OP, BACKENDS, name)()


def count_by_expert(choice: Tensor, num_experts: int, backend: str) -> Load:
    """choice [T] int64 in [0, E]; tokens of class E go to no expert."""
    return named(_OP, _of(backend).count)(choice, num_experts)


def sort_by_expert(load: Load, known: int | None = None) -> Order:
    """Stable. `known`: tokens with an expert, where the host knows the number."""
    return Order(named(_OP, _of(load.backend).sort)(load), load.counts, load.backend, known)


def gather(tokens: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """tokens [T, D] -> rows [R, D] by expert, and the tokens again, for `rest_of`: taken from
    there, their gradient costs no pass of its own."""
    return named(_OP, _of(order.backend).gather)(tokens, order)


def rest_of(base: Tensor, order: Order) -> Tensor:
    """base [T, D], what tokens without an expert put out: `gather`'s tokens -> what `scatter`
    takes, which need not be kept and may be overwritten. Apart from it, so that it can be made
    while rows travel. Of anything else the gradient would be undefined: Triton's leaves the rows
    of tokens with an expert unwritten, which `gather` knows."""
    return named(_OP, _of(order.backend).rest)(base, order)


def scatter(rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None) -> Tensor:
    """rows [R, D] -> [T, D] in the tokens' places; tokens without an expert have their row of
    `rest` there, or zero. Each token's is multiplied by probability [T], if one is given."""
    return named(_OP, _of(order.backend).scatter)(rows, order, rest, probability)
