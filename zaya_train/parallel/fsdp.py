"""FSDP2 on a ZAYA model (contract 1 of the design)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from zaya_kernels.dtypes import DTYPES
from zaya_kernels.grouped_mlp.types import MainGradients

from zaya_train.parallel.collectives import row_counts
from zaya_train.parallel.experts import divide_experts

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    from zaya_train.config.precision import PrecisionConfig
    from zaya_train.config.schema import AccumulationKind, ParallelConfig
    from zaya_train.model.zaya import ZayaModel
    from zaya_train.parallel.mesh import Mesh


def shard(
    model: ZayaModel, mesh: Mesh, precision: PrecisionConfig, reshard_after_forward: bool
) -> None:
    """Shard every layer, then the root (embedding and final norm), in place.

    Under expert parallelism a layer's experts are a unit of their own, sharded over the ranks that
    hold parts of the same experts.

    Gradients are summed, never averaged: the loss is divided by the global count of supervised
    tokens beforehand. AVG would divide dense and expert gradients by the sizes of different groups.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[precision.compute_dtype],
        reduce_dtype=DTYPES[precision.reduce_dtype],
        # The residual stream enters layers in fp32 and must stay so.
        cast_forward_inputs=False,
    )
    apply = partial(fully_shard, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for layer in model.layers:
        if mesh.sparse is not None:
            experts = layer.get_submodule("moe.experts")
            divide_experts(experts, mesh.sparse["expert"])
            apply(experts, mesh=mesh.expert_fsdp)
        apply(layer, mesh=mesh.fsdp)
    apply(model, mesh=mesh.fsdp)
    _gather_ahead(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no PREMUL_SUM, which a divide factor would select.
            module.set_force_sum_reduction_for_comms(True)


def _gather_ahead(model: ZayaModel) -> None:
    """Launch a layer's gathers when the layer before it begins.

    Every layer makes the host wait for the device once, for the experts' counts (unless their
    kernels read them, and all are here), so a gather that is launched where it is needed runs
    beside half a layer at best. In the backward pass nothing
    waits and torch launches the next gather by itself. The rehearsed peak is the same either way:
    it lies in the backward pass or where all weights are gathered anyway.
    """
    ahead: ZayaModel | nn.Module = model
    for layer in model.layers:
        units: list[FSDPModule] = [
            module for module in layer.modules() if isinstance(module, FSDPModule)
        ]
        assert isinstance(ahead, FSDPModule)
        ahead.set_modules_to_forward_prefetch(units)
        ahead = layer


@dataclass(frozen=True)
class Reduction:
    """How the gradients of a step's micro-batches come together over the ranks."""

    replicas: int
    """Copies of the sharded parameters, whose reduced gradients must be equal."""
    accumulation: AccumulationKind
    """See config.schema.ParallelConfig."""
    keep_gathered: bool
    """Gathered weights live until the step's last backward pass."""

    @staticmethod
    def of(mesh: Mesh, parallel: ParallelConfig) -> Reduction:
        keep_gathered = not parallel.reshard_after_forward
        return Reduction(mesh.layout.replicate, parallel.accumulation, keep_gathered)

    def prepare(self, model: ZayaModel, last: bool) -> None:
        """Before each micro-batch's forward pass; `last`: the step's last one."""
        if not isinstance(model, FSDPModule):
            return
        model.set_requires_gradient_sync(last or self.accumulation != "keep_unsharded")
        model.set_requires_all_reduce(last or self.accumulation == "reduce_each")
        model.set_reshard_after_backward(last or not self.keep_gathered)


class GradientSums:
    """The fp32 sums in which FSDP2 keeps a unit's whole gradients from one micro-batch to the next,
    for kernels that add to them by themselves.

    They exist from a step's second micro-batch on, under parallel.accumulation=keep_unsharded,
    where gradients are of another type than their reduction (torch 2.13, `FSDPParam`: post_backward
    makes them, adds what autograd left in `.grad`, if anything, and hands them to the reduction).
    """

    def __init__(self) -> None:
        self._parameters: dict[nn.Module, dict[str, FSDPParam]] = defaultdict(dict)

    def attach(self, model: nn.Module) -> None:
        """After `shard`."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for parameter in group.fsdp_params:
                        place = parameter._module_info
                        self._parameters[place.module][place.param_name] = parameter

    def of(self, experts: nn.Module) -> MainGradients | None:
        """See Surroundings.main_gradients."""
        own = self._parameters.get(experts, {})
        sums = [
            own[name].unsharded_accumulated_grad_data
            for name in MainGradients.__dataclass_fields__
            if name in own and own[name].unsharded_accumulated_grad is not None
        ]
        return MainGradients(*sums) if len(sums) == 2 else None


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
    """First row of the full tensor held by this rank.

    Sharding is along dim 0, over one axis or, for experts, over two: first the expert axis, then
    the axis on its left, which torch calls a strided shard.
    """
    mesh = tensor.device_mesh
    axes = [i for i, p in enumerate(tensor.placements) if isinstance(p, Shard | _StridedShard)]
    start, rows = 0, tensor.shape[0]
    for axis in reversed(axes):
        counts, rank = row_counts(rows, mesh.size(axis)), mesh.get_local_rank(axis)
        start, rows = start + sum(counts[:rank]), counts[rank]
    return start
