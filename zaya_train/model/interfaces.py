"""What the single-device model asks of its surroundings.

The model is plain torch code for one device. Whatever crosses devices is injected through these
Protocols; the defaults here are the single-device forms and the reference for every parallel one.

Legend: B batch, S local sequence, T = B S tokens, D hidden, E experts, n chunks per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from zaya_kernels.grouped_mlp.op import COUNTS_STAY_ON_DEVICE
from zaya_kernels.moe_permute.op import count_by_expert, gather, rest_of, scatter, sort_by_expert

from zaya_train.config.schema import KernelsConfig, RecomputeKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from zaya_kernels.grouped_mlp.types import MainGradients


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
    """[E_local] int64: rows that each local expert receives. On the host they sum to R; on the
    device, where nobody waited for them, perhaps to less: the last rows have no expert then."""
    handle: Any
    """What the dispatcher that made it needs to bring tokens there and back."""


@dataclass(frozen=True)
class Pending:
    """Rows under way, from a `start_` to its `finish_`, which alone may read them."""

    rows: Tensor
    route: Route
    awaited: Any = None
    """What the dispatcher that started it waits for."""
    tokens: Tensor | None = None
    """On the way there: the tokens again, for what those put out that go to no expert."""


class TokenDispatcher(Protocol):
    """Brings tokens to experts and results back; dropless.

    Either way has two steps: `start_` does the local work before the communication and launches it,
    `finish_` waits for it and does the local work after it. What a caller does between them runs
    while rows travel; its backward, between the launch and the wait of the gradients' way.
    """

    def route(self, choice: Tensor, num_experts: int, kernels: KernelsConfig) -> Route:
        """choice [T] int64; tokens with choice >= num_experts go to no expert. num_experts counts
        all experts, wherever they are. Waits for the device once where sizes are shapes: for rows
        that travel, or of an expert kernel that needs the counts."""
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

    def finish_combine(self, pending: Pending, base: Tensor | None, probability: Tensor) -> Tensor:
        """-> [T, D] in token order, times probability [T]; tokens that went to no expert have
        their row of `base` [T, D] there, or zero. `base` is `Pending.tokens` of the way there and
        nothing else: gradients of its other rows are undefined (moe_permute.op.rest_of)."""
        ...

    def own_experts(self, stack: Tensor) -> Tensor:
        """A parameter that stacks all experts along dim 0 -> [E_local, ...], those whose rows
        are brought here, as a plain tensor."""
        ...


class LocalDispatcher:
    """TokenDispatcher of a rank that holds every expert: a stable sort, no communication."""

    def route(self, choice: Tensor, num_experts: int, kernels: KernelsConfig) -> Route:
        """See TokenDispatcher."""
        load = count_by_expert(choice, num_experts, kernels.moe_permute)
        counts = load.counts[:num_experts]
        if kernels.grouped_mlp in COUNTS_STAY_ON_DEVICE:
            return Route(counts, sort_by_expert(load))
        counts = counts.cpu()
        return Route(counts, sort_by_expert(load, int(counts.sum())))

    def start_dispatch(self, tokens: Tensor, route: Route) -> Pending:
        """See TokenDispatcher."""
        rows, tokens = gather(tokens, route.handle)
        return Pending(rows, route, tokens=tokens)

    def finish_dispatch(self, pending: Pending) -> Tensor:
        """See TokenDispatcher."""
        return pending.rows

    def start_combine(self, rows: Tensor, route: Route) -> Pending:
        """See TokenDispatcher."""
        return Pending(rows, route)

    def finish_combine(self, pending: Pending, base: Tensor | None, probability: Tensor) -> Tensor:
        """See TokenDispatcher."""
        order = pending.route.handle
        rest = None if base is None else rest_of(base, order)
        return scatter(pending.rows, order, rest, probability)

    def own_experts(self, stack: Tensor) -> Tensor:
        """See TokenDispatcher."""
        return stack


def no_sums(_: nn.Module) -> None:
    """Nobody keeps sums of gradients: autograd gets them all."""


@dataclass(frozen=True)
class Surroundings:
    """Everything injected into a model: who exchanges, who dispatches, which kernels run, what is
    made again in the backward pass, where gradients are summed."""

    exchange: ContextExchange = field(default_factory=WholeRows)
    dispatcher: TokenDispatcher = field(default_factory=LocalDispatcher)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    recompute: RecomputeKind = "none"
    fp8_experts: bool = False
    """The experts' products have operands of eight bits."""
    main_gradients: Callable[[nn.Module], MainGradients | None] = no_sums
    """Of a module of experts: fp32 sums to which kernels add its gradients in the coming backward
    pass, or None."""
