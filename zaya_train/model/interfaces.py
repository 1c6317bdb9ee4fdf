"""What the single-device model asks of its surroundings.

The model is plain torch code for one device. Whatever crosses devices is injected through these
Protocols; the defaults here are the single-device forms and the reference for every parallel one.

Legend: B batch, S local sequence, T = B S tokens, D hidden, E experts, n chunks per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from zaya_kernels.counts import count_classes

from zaya_train.config.schema import KernelsConfig, RecomputeKind

if TYPE_CHECKING:
    from torch import Tensor


class ContextExchange(Protocol):
    """Moves what a row's tokens need from the other ranks that hold parts of the row."""

    def halo(self, x: Tensor, rows: int) -> Tensor | None:
        """x [B, S, C] -> [B, n, rows, C], the rows before each local chunk (zeros before the row);
        None when this rank holds whole rows."""
        ...

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys and values [B, S, K, d] -> [B, S_row, K, d], the whole row in order; gradients are
        summed back."""
        ...


class WholeRows:
    """ContextExchange of a rank that holds whole rows."""

    def halo(self, x: Tensor, rows: int) -> Tensor | None:
        """Nothing precedes a row."""
        return None

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The row is here already."""
        return keys, values


@dataclass(frozen=True)
class Route:
    """Where one layer's tokens go; follows from the choice alone, so it is made once per choice."""

    counts: Tensor
    """[E_local] int64 on the host: rows that each local expert receives, summing to R."""
    handle: Any
    """What the dispatcher that made it needs to bring tokens there and back."""


@dataclass(frozen=True)
class Pending:
    """Rows under way, from a `start_` to its `finish_`, which alone may read them."""

    rows: Tensor
    route: Route
    awaited: Any = None
    """What the dispatcher that started it waits for."""


class TokenDispatcher(Protocol):
    """Brings tokens to experts and results back; dropless.

    Either way has two steps: `start_` does the local work before the communication and launches it,
    `finish_` waits for it and does the local work after it. What a caller does between them runs
    while rows travel; its backward, between the launch and the wait of the gradients' way.
    """

    def route(self, choice: Tensor, num_experts: int) -> Route:
        """choice [T] int64; tokens with choice >= num_experts go to no expert. num_experts counts
        all experts, wherever they are. Waits for the device once, because sizes are shapes."""
        ...

    def start_dispatch(self, tokens: Tensor, route: Route) -> Pending:
        """tokens [T, D] leave for their experts."""
        ...

    def finish_dispatch(self, pending: Pending) -> Tensor:
        """-> rows [R, D] for this rank's experts, sorted by expert."""
        ...

    def start_combine(self, rows: Tensor, route: Route) -> Pending:
        """rows [R, D], as `finish_dispatch` gave them, leave for where they came from."""
        ...

    def finish_combine(self, pending: Pending, base: Tensor) -> Tensor:
        """-> base [T, D] with the rows written over it, in place, in token order; tokens that went
        to no expert keep their row of `base`. Its other rows must not depend on any input: their
        gradient is not zeroed."""
        ...

    def own_experts(self, stack: Tensor) -> Tensor:
        """A parameter that stacks all experts along dim 0 -> [E_local, ...], those whose rows
        are brought here, as a plain tensor."""
        ...


class Permute(torch.autograd.Function):
    """Rows of x [T, D] by index [R]; the backward is a gather by the inverse, or a copy when rows
    are left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        full = grad.new_empty if index.numel() == ctx.size else grad.new_zeros
        return full(ctx.size, *grad.shape[1:]).index_copy_(0, index, grad), None


class Unpermute(torch.autograd.Function):
    """The reverse: rows [R, D] to their places in base [T, D], in place. The backward hands base's
    gradient back whole: what stands where rows land must not depend on anything."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, base: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.mark_dirty(base)
        return base.index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, grad


class LocalDispatcher:
    """TokenDispatcher of a rank that holds every expert: a stable sort, no communication."""

    def route(self, choice: Tensor, num_experts: int) -> Route:
        """See TokenDispatcher."""
        order = torch.argsort(choice, stable=True)
        counts = count_classes(choice, num_experts + 1)[:num_experts].cpu()
        return Route(counts, order[: int(counts.sum())])

    def start_dispatch(self, tokens: Tensor, route: Route) -> Pending:
        """See TokenDispatcher."""
        return Pending(Permute.apply(tokens, route.handle), route)

    def finish_dispatch(self, pending: Pending) -> Tensor:
        """See TokenDispatcher."""
        return pending.rows

    def start_combine(self, rows: Tensor, route: Route) -> Pending:
        """See TokenDispatcher."""
        return Pending(rows, route)

    def finish_combine(self, pending: Pending, base: Tensor) -> Tensor:
        """See TokenDispatcher."""
        return Unpermute.apply(pending.rows, pending.route.handle, base)

    def own_experts(self, stack: Tensor) -> Tensor:
        """See TokenDispatcher."""
        return stack


@dataclass(frozen=True)
class Surroundings:
    """Everything injected into a model: who exchanges, who dispatches, which kernels run, what is
    made again in the backward pass."""

    exchange: ContextExchange = field(default_factory=WholeRows)
    dispatcher: TokenDispatcher = field(default_factory=LocalDispatcher)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    recompute: RecomputeKind = "none"
