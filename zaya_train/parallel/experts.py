"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Every rank of an `expert` group (see `mesh`) holds E / n experts. A rank sorts its tokens by expert,
so that what goes to one rank lies together; one all-to-all with uneven splits brings the rows; they
arrive ordered by sender, and a second permutation orders them by expert. Tokens of the skip class
do not travel. Nothing is dropped and nothing padded: a rank may send or receive no row at all.

Legend: T local tokens, D hidden, E experts, n ranks, R received rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from zaya_train.model.interfaces import Permute, Route, Unpermute, count_classes
from zaya_train.parallel.collectives import exchange_rows

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Journey:
    """The handle of AllToAllDispatcher's routes."""

    order: Tensor
    """[sum of sends] int64: local tokens in the order of sending, by expert."""
    tokens: int
    """T."""
    sends: list[int]
    """Rows to each rank."""
    receives: list[int]
    """Rows from each rank."""
    arrival: Tensor
    """[R] int64: received rows in the order of local experts, then of senders."""


class AllToAllDispatcher:
    """TokenDispatcher of ranks that divide the experts among them.

    Local steps (`leave`, `enter` and their reverses) and communication (`exchange`) are methods of
    their own, so that a caller with independent work can put it between them; `dispatch` and
    `combine` chain them.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def route(self, choice: Tensor, num_experts: int) -> Route:
        """See TokenDispatcher. Collective: ranks tell each other how many rows will come."""
        ranks = self.group.size()
        counts = count_classes(choice, num_experts + 1)[:num_experts]
        arriving = torch.empty_like(counts)
        told = dist.all_to_all_single(arriving, counts, group=self.group, async_op=True)
        order = torch.argsort(choice, stable=True)
        told.wait()
        # The only wait for the device: split sizes are arguments of the collective.
        sent, received = torch.stack([counts, arriving]).view(2, ranks, -1).tolist()
        sends, receives = ([sum(rank) for rank in rows] for rows in (sent, received))
        local = torch.arange(num_experts // ranks, device=choice.device).repeat(ranks)
        expert = torch.repeat_interleave(local, arriving, output_size=sum(receives))
        return Route(
            torch.tensor(received).sum(dim=0),
            Journey(
                order[: sum(sends)],
                choice.shape[0],
                sends,
                receives,
                torch.argsort(expert, stable=True),
            ),
        )

    def dispatch(self, tokens: Tensor, route: Route) -> Tensor:
        """See TokenDispatcher. Collective, as is its backward."""
        return self.enter(self.exchange(self.leave(tokens, route), route), route)

    def combine(self, rows: Tensor, route: Route) -> Tensor:
        """See TokenDispatcher. Collective, as is its backward."""
        journey: Journey = route.handle
        back = Unpermute.apply(rows, journey.arrival, rows.shape[0])
        home = exchange_rows(back, journey.receives, journey.sends, self.group)
        return Unpermute.apply(home, journey.order, journey.tokens)

    def leave(self, tokens: Tensor, route: Route) -> Tensor:
        """tokens [T, D] -> rows in the order of sending. Local."""
        return Permute.apply(tokens, route.handle.order)

    def exchange(self, rows: Tensor, route: Route) -> Tensor:
        """Rows in the order of sending -> rows in the order of arrival [R, D]. Communication."""
        journey: Journey = route.handle
        return exchange_rows(rows, journey.sends, journey.receives, self.group)

    def enter(self, rows: Tensor, route: Route) -> Tensor:
        """Rows in the order of arrival -> rows sorted by local expert. Local."""
        return Permute.apply(rows, route.handle.arrival)

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
