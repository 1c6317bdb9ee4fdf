"""Copies of a state in host memory, from which a save writes while training changes the state.

The buffers are kept from one save to the next: fresh memory costs its page faults (measured: ten
times the copy itself), pinned memory a call into the driver. They take as much host memory as the
rank's share of the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Mapping


def local_shard(value: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself; without its gradient's history."""
    shard: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return shard.detach()


class HostCopies:
    """Host buffers for one state, pinned where the state lies on an accelerator."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the buffers of `tensors` and touch their pages; drop those of other tensors."""
        shards = {key: local_shard(value) for key, value in tensors.items()}
        # Those that do not fit go first: old and new ones together would be twice the memory.
        self._buffers = {
            key: buffer
            for key, buffer in self._buffers.items()
            if key in shards and _alike(buffer, shards[key])
        }
        for key, shard in shards.items():
            if key not in self._buffers:
                pinned = shard.device.type != "cpu"
                self._buffers[key] = torch.zeros(shard.shape, dtype=shard.dtype, pin_memory=pinned)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `tensors` with the same keys and placements; valid until the next call."""
        self.reserve(tensors)
        copies: dict[str, Tensor] = {}
        on_accelerator = False
        for key, value in tensors.items():
            buffer, shard = self._buffers[key], local_shard(value)
            buffer.copy_(shard, non_blocking=True)
            on_accelerator |= shard.device.type != "cpu"
            # Not DTensor.from_local: it would move the copy to the mesh's device.
            copies[key] = (
                DTensor(buffer, value._spec, requires_grad=False)
                if isinstance(value, DTensor)
                else buffer
            )
        if on_accelerator:
            torch.accelerator.synchronize()
        return copies


def _alike(buffer: Tensor, shard: Tensor) -> bool:
    pinned = shard.device.type != "cpu"
    return (buffer.shape, buffer.dtype, buffer.is_pinned()) == (shard.shape, shard.dtype, pinned)
