"""What a rank sends through collectives, counted where torch dispatches them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_to_all_single": "all_to_all",
}
"""Operators of all namespaces -> what users call them. Any other fails, so that none is missed."""
LOCAL = ("wait_tensor", "_wrap_tensor_autograd")
"""Operators of these namespaces that send nothing."""


def collective(func: Any, args: Any) -> tuple[str, ProcessGroup, Tensor] | None:
    """Kind, group and operand of an operator's call; None where it moves nothing.

    KeyError for an operator that is not known.
    """
    namespace, name = func._schema.name.split("::")
    if namespace not in NAMESPACES or name in LOCAL:
        return None
    kind = KINDS[name]
    if namespace == "c10d":
        group = ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        return kind, group, args[0][0] if kind == "all_reduce" else args[1]
    named = [a.name for a in func._schema.arguments].index("group_name")
    group = args[named]
    if not isinstance(group, ProcessGroup):
        group = _resolve_process_group(group)
    return kind, group, args[0]


def of_dtensors(types: Iterable[Any]) -> bool:
    """Whether a mode must return NotImplemented: a DTensor then takes the call apart first, and the
    mode sees its collectives, which are hidden from it inside the DTensor's own dispatch."""
    return any(issubclass(kind, DTensor) for kind in types)


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operand bytes of every collective while active, per (kind, ranks of the group).

    Operands: what this rank contributes. An all-gather's is its own part, a reduce-scatter's and an
    all-reduce's the whole buffer, an all-to-all's everything it sends, to itself included.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        self.dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
        """Of the operands of each kind."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if of_dtensors(types):
            return NotImplemented
        if found := collective(func, args):
            kind, group, operand = found
            size = operand.numel() * operand.element_size()
            ranks = tuple(dist.get_process_group_ranks(group))
            self.operands[kind, ranks].append(size)
            self.dtypes[kind].add(operand.dtype)
        return func(*args, **(kwargs or {}))

    def sent_bytes(self, kind: str) -> int:
        """Of one kind, over every group."""
        return sum(sum(sizes) for (k, _), sizes in self.operands.items() if k == kind)
