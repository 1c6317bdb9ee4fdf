"""Permutation by expert with the moves in C (native/permute.c), and torch's stable sort."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensor

from zaya_kernels.moe_permute import eager, moves
from zaya_kernels.moe_permute.types import Load
from zaya_kernels.native.library import TYPES, call, check, check_shape

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.moe_permute.moves import Scattered
    from zaya_kernels.moe_permute.types import Order

sort = eager.sort


def count(choice: Tensor, num_experts: int) -> Load:
    """See `zaya_kernels.moe_permute.op.count_by_expert`."""
    return Load(choice, eager.count(choice, num_experts).counts, "native")


def _shape(order: Order, x: Tensor) -> tuple[int, ...]:
    """`Shape` of permute.c."""
    routed = order.known
    if routed is None:
        counted = not isinstance(order.counts, FakeTensor)
        routed = order.num_rows - (int(order.counts[-1]) if counted else 0)
    return order.order.numel(), routed, x.shape[1], TYPES[x.dtype], torch.get_num_threads()


def _to_rows(tokens: Tensor, order: Order) -> Tensor:
    rows = tokens.new_empty(order.num_rows, tokens.shape[1])
    call("zaya_gather", _shape(order, tokens), order.order, tokens, rows)
    return rows


def _to_tokens(
    rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None
) -> Tensor:
    out = rows.new_empty(order.order.numel(), rows.shape[1])
    exact = 0 if probability is None else TYPES[probability.dtype]
    call("zaya_scatter", _shape(order, rows), order.order, rows, rest, probability, exact, out)
    return out


def _scatter_backward(grad: Tensor, order: Order, of: Scattered, made: Scattered) -> None:
    tensors, exact = (grad, *of, *made), TYPES[of[2].dtype]
    call("zaya_scatter_backward", _shape(order, grad), order.order, tensors, exact)


_MOVES = moves.Moves(_to_rows, _to_tokens, _scatter_backward)


def gather(tokens: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.moe_permute.op.gather`."""
    check("moe_permute", tokens)
    check_shape("moe_permute: tokens", tokens, (order.order.numel(), None))
    return moves.gather(tokens, order, _MOVES)


def rest(base: Tensor, order: Order) -> Tensor:
    """See `zaya_kernels.moe_permute.op.rest_of`."""
    return base


def scatter(rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None) -> Tensor:
    """See `zaya_kernels.moe_permute.op.scatter`."""
    check("moe_permute", rows, *(() if rest is None else (rest,)))
    tokens = order.order.numel()
    check_shape("moe_permute: rows", rows, (order.num_rows, None))
    if rest is not None:
        check_shape("moe_permute: rest", rest, (tokens, rows.shape[1]))
    if probability is not None:
        check("moe_permute", probability)
        check_shape("moe_permute: probability", probability, (tokens,))
    return moves.scatter(rows, order, rest, probability, _MOVES)
