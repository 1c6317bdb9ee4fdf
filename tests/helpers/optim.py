"""Shards with given values and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from zaya_train.optim.shards import Shard

if TYPE_CHECKING:
    from collections.abc import Sequence


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shards_of(values: Sequence[Tensor]) -> list[Shard]:
    return [Shard.of(f"p{i}", Parameter(value.clone())) for i, value in enumerate(values)]


def give_gradients(parameters: Sequence[Tensor], step: int) -> None:
    for i, parameter in enumerate(parameters):
        parameter.grad = randn(*parameter.shape, seed=1000 * step + i)
