"""Shapes of a model's parameters, made once per configuration: building a deep model takes long."""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from zaya_train.model.zaya import ZayaModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.config.schema import ModelConfig


@lru_cache(maxsize=8)
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Of every parameter, by name. The mapping is shared and read-only."""
    with torch.device("meta"):
        model = ZayaModel(config)
    return MappingProxyType({name: tuple(p.shape) for name, p in model.named_parameters()})
