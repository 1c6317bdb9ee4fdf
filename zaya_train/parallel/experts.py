"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Every rank of an `expert` group (see `mesh`) holds E / n experts. A rank sorts its tokens by expert,
so that what goes to one rank lies together; one all-to-all with uneven splits brings the rows; they
arrive ordered by sender, and a second permutation orders them by expert. Tokens of the skip class
do not travel. Nothing is dropped and nothing padded: a rank may send or receive no row at all.

Legend: T local tokens, D hidden, E experts, n ranks, R received rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from zaya_kernels.moe_permute.op import count_by_expert, gather, rest_of, scatter, sort_by_expert

from zaya_train.model.interfaces import Pending, Route
from zaya_train.parallel.collectives import Crossing

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from zaya_kernels.moe_permute.types import Order

    from zaya_train.config.schema import KernelsConfig


@dataclass(frozen=True)
class Journey:
    """The handle of AllToAllDispatcher's routes."""

    order: Order
    """Local tokens in the order of sending, by expert."""
    sends: list[int]
    """Rows to each rank."""
    receives: list[int]
    """Rows from each rank."""
    arriving: Tensor
    """[n * E / n] int64: rows from each rank for each local expert."""

    @cached_property
    def arrival(self) -> Order:
        """Received rows in the order of local experts, then of senders."""
        experts = self.arriving.numel() // len(self.receives)
        local = torch.arange(experts, device=self.arriving.device).repeat(len(self.receives))
        total = sum(self.receives)
        expert = torch.repeat_interleave(local, self.arriving, output_size=total)
        return sort_by_expert(count_by_expert(expert, experts, self.order.backend), total)


class AllToAllDispatcher:
    """TokenDispatcher of ranks that divide the experts among them."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def route(self, choice: Tensor, num_experts: int, kernels: KernelsConfig) -> Route:
        """See TokenDispatcher. Collective: ranks tell each other how many rows will come."""
        ranks = self.group.size()
        load = count_by_expert(choice, num_experts, kernels.moe_permute)
        counts = load.counts[:num_experts]
        arriving = torch.empty_like(counts)
        told = dist.all_to_all_single(arriving, counts, group=self.group, async_op=True)
        order = sort_by_expert(load)
        told.wait()
        # The only wait for the device: split sizes are arguments of the collective.
        sent, received = torch.stack([counts, arriving]).view(2, ranks, -1).tolist()
        sends, receives = ([sum(rank) for rank in rows] for rows in (sent, received))
        return Route(
            torch.tensor(received).sum(dim=0),
            Journey(replace(order, known=sum(sends)), sends, receives, arriving),
        )

    def start_dispatch(self, tokens: Tensor, route: Route) -> Pending:
        """See TokenDispatcher. Collective, as is its backward."""
        journey: Journey = route.handle
        crossing = Crossing(journey.sends, journey.receives, self.group)
        rows, tokens = gather(tokens, journey.order)
        pending = Pending(crossing.launch(rows), route, crossing, tokens)
        # Sorted while rows travel, for use on their arrival and before their return.
        _ = journey.arrival
        return pending

    def finish_dispatch(self, pending: Pending) -> Tensor:
        """See TokenDispatcher."""
        return gather(pending.awaited.land(pending.rows), pending.route.handle.arrival)[0]

    def start_combine(self, rows: Tensor, route: Route) -> Pending:
        """See TokenDispatcher. Collective, as is its backward."""
        journey: Journey = route.handle
        crossing = Crossing(journey.receives, journey.sends, self.group)
        back = scatter(rows, journey.arrival, None, None)
        return Pending(crossing.launch(back), route, crossing)

    def finish_combine(self, pending: Pending, base: Tensor | None, probability: Tensor) -> Tensor:
        """See TokenDispatcher."""
        order = pending.route.handle.order
        # While rows travel.
        rest = None if base is None else rest_of(base, order)
        return scatter(pending.awaited.land(pending.rows), order, rest, probability)

    def own_experts(self, stack: Tensor) -> Tensor:
        """See TokenDispatcher."""
        if not isinstance(stack, DTensor):
            raise TypeError("expert weights have not been divided: call divide_experts first")
        return stack.to_local()


def divide_experts(experts: nn.Module, axis: DeviceMesh) -> None:
    """Divide every parameter of `experts` along its first dimension over the ranks of `axis`, in
    place; on the meta device, nothing moves."""
    for name, parameter in list(experts.named_parameters()):
        divided = distribute_tensor(parameter.detach(), axis, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, torch.nn.Parameter(divided))
