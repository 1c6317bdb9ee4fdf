"""Size of a checkpoint, and the host memory that writing it in the background takes."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from zaya_kernels.dtypes import DTYPES

from zaya_train.model.shapes import parameter_shapes
from zaya_train.optim.table import assign
from zaya_train.planning.weights import weights_of

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig
    from zaya_train.planning.case import Case

_FP32, _INT64 = 4, 8


def checkpoint_bytes(config: TrainConfig) -> int:
    """Tensors of one checkpoint: weights, balancing biases, momentum, both moments, counters.
    Hashes and metadata besides are kilobytes."""
    shapes = parameter_shapes(config.model)
    table = assign(shapes)
    elements = {"muon": 0, "adamw": 0}
    for name, shape in shapes.items():
        elements[table[name].optimizer] += prod(shape)
    momentum = DTYPES[config.optim.muon.momentum_dtype].itemsize
    classes = config.model.num_experts + int(config.model.skip_class)
    # A bias and its two moments.
    balancing = 3 * _FP32 * config.model.num_layers * classes
    weights = _FP32 * sum(elements.values())
    moments = momentum * elements["muon"] + 2 * _FP32 * elements["adamw"]
    return weights + moments + balancing + 2 * _INT64


def host_bytes(case: Case) -> int:
    """Host memory of rank 0 for copies of its share, kept from one background save to the next."""
    if not case.config.checkpoint.asynchronous:
        return 0
    weights = weights_of(case.model, case.layout)
    momentum = DTYPES[case.config.optim.muon.momentum_dtype].itemsize
    moments = momentum * weights.muon + 2 * _FP32 * (weights.local - weights.muon)
    return _FP32 * weights.local + moments
