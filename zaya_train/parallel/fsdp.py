"""FSDP2 on a ZAYA model (contract 1 of the design)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from zaya_kernels.dtypes import DTYPES

from zaya_train.parallel.collectives import row_counts

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_train.config.schema import PrecisionConfig
    from zaya_train.model.zaya import ZayaModel
    from zaya_train.parallel.mesh import Mesh


def shard(
    model: ZayaModel, mesh: Mesh, precision: PrecisionConfig, reshard_after_forward: bool
) -> None:
    """Shard every layer, then the root (embedding and final norm), in place.

    Gradients are summed, never averaged: the loss is divided by the global count of supervised
    tokens beforehand, and AVG would be wrong once expert parallelism makes groups of different
    size.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[precision.compute_dtype],
        reduce_dtype=DTYPES[precision.reduce_dtype],
        # The residual stream enters layers in fp32 and must stay so.
        cast_forward_inputs=False,
    )
    for layer in model.layers:
        fully_shard(
            layer, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=reshard_after_forward
        )
    fully_shard(
        model, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=reshard_after_forward
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no PREMUL_SUM, which a divide factor would select.
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: ZayaModel) -> None:
    """Free gathered weights that no backward pass will free, as after a forward pass alone; until
    then the model's parameters are the gathered copies in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def write_full(target: Tensor, full: Tensor) -> None:
    """Store a full tensor into a sharded (or plain) one, keeping this rank's rows."""
    if not isinstance(target, DTensor):
        target.copy_(full)
        return
    local = target.to_local()
    start = local_row_start(target)
    local.copy_(full[start : start + local.shape[0]])


def local_row_start(tensor: DTensor) -> int:
    """First row of the full tensor held by this rank (sharding is along dim 0)."""
    (axis,) = (i for i, p in enumerate(tensor.placements) if p.is_shard())
    rank, ranks = tensor.device_mesh.get_local_rank(axis), tensor.device_mesh.size(axis)
    return sum(row_counts(tensor.shape[0], ranks)[:rank])
