"""What one phase is made of: model, mesh and optimizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from zaya_train.optim.exchange import Groups
from zaya_train.optim.optimizer import Optimizer
from zaya_train.optim.table import summary
from zaya_train.parallel.apply import parallelize
from zaya_train.parallel.fsdp import write_full

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from zaya_train.config.schema import ModelConfig, PhaseConfig, TrainConfig
    from zaya_train.model.zaya import ZayaModel
    from zaya_train.parallel.mesh import Mesh

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """One phase's parts."""

    name: str
    phase: PhaseConfig
    mesh: Mesh
    model: ZayaModel
    model_config: ModelConfig
    optimizer: Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds, by stable name. Weights are the optimizer's, always the
        fp32 shards; the model's own are the gathered copies between forward and backward."""
        state: dict[str, Tensor] = {
            f"model.{name}": shard.parameter for name, shard in self.optimizer.shards.items()
        }
        state |= {f"model.{name}": value for name, value in self.model.named_buffers()}
        return state | self.optimizer.tensors()

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Store whole tensors into the sharded model, one by one."""
        targets = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with torch.no_grad():
            for name, full in weights:
                write_full(targets[name], full.to(targets[name].device, torch.float32))


def groups_of(mesh: Mesh) -> Groups:
    """The company of the mesh's shards."""
    return Groups(mesh.fsdp_group, mesh.sharding.get_group("replicate"))


def optimizer_of(
    config: TrainConfig, model: ZayaModel, groups: Groups, kind: type[Optimizer] = Optimizer
) -> Optimizer:
    """A new optimizer of the whole model, as the configuration says; collective."""
    return kind(
        dict(model.named_parameters()),
        [buffer for _, buffer in model.named_buffers()],
        config.model.num_experts,
        config.optim,
        groups,
        config.kernels.newton_schulz,
    )


def build_phase(
    config: TrainConfig, row: tuple[str, PhaseConfig], mesh: Mesh, device: torch.device
) -> Built:
    """Model and optimizer of the phase `row` (name, phase) on its mesh; collective."""
    name, phase = row
    model_config = replace(config.model, rope_base=phase.rope_base)
    model = parallelize(config, model_config, mesh, device)
    optimizer = optimizer_of(config, model, groups_of(mesh))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    log.info(
        "phase %s: %d tokens of context, mesh %s\n%s",
        name,
        phase.context_tokens,
        mesh.layout,
        "\n".join(summary(optimizer.table, shapes)),
    )
    return Built(name, phase, mesh, model, model_config, optimizer)
