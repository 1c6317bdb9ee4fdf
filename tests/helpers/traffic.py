"""What a rank sends through collectives, counted where torch dispatches them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch import Tensor

KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
}
"""c10d's operators -> what users call them."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operand bytes of every collective while active, per (kind, ranks of the group).

    Operands: what this rank contributes. An all-gather's is its own part, a reduce-scatter's and an
    all-reduce's the whole buffer, an all-to-all's everything it sends, to itself included.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            kind = KINDS[name]
            group = ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
            operand: Tensor = args[0][0] if kind == "all_reduce" else args[1]
            size = operand.numel() * operand.element_size()
            ranks = tuple(dist.get_process_group_ranks(group))
            self.operands[kind, ranks].append(size)
        return func(*args, **(kwargs or {}))

    def sent_bytes(self, kind: str) -> int:
        """Of one kind, over every group."""
        return sum(sum(sizes) for (k, _), sizes in self.operands.items() if k == kind)
