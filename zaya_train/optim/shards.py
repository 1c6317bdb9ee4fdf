"""Parameters as the optimizers see them: this rank's rows of a full tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


@dataclass(frozen=True)
class Shard:
    """One parameter's local part. Elementwise work happens on `local`, which shares its storage."""

    name: str
    parameter: Parameter
    local: Tensor

    @staticmethod
    def of(name: str, parameter: Parameter) -> Shard:
        return Shard(name, parameter, _local(parameter.detach()))

    @property
    def grad(self) -> Tensor:
        """This rank's part of the gradient; zeros where the parameter took no part in the loss."""
        if self.parameter.grad is None:
            return torch.zeros_like(self.local)
        return _local(self.parameter.grad)

    def state(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new zero tensor shaped like the local part."""
        return torch.zeros_like(self.local, dtype=dtype)

    def as_full(self, local: Tensor) -> Tensor:
        """`local` presented as the parameter is: a DTensor of the full shape, or itself."""
        like = self.parameter
        if not isinstance(like, DTensor):
            return local
        return DTensor.from_local(
            local,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
