"""From a configuration and a mesh to a sharded model with values: one function, one order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from zaya_kernels.attention.flash import REFUSAL
from zaya_kernels.dtypes import DTYPES
from zaya_kernels.native import library

from zaya_train.config.errors import ConfigError
from zaya_train.model.init import initialise
from zaya_train.model.interfaces import (
    ContextExchange,
    LocalDispatcher,
    Surroundings,
    TokenDispatcher,
    WholeRows,
)
from zaya_train.model.zaya import ZayaModel
from zaya_train.parallel.experts import AllToAllDispatcher
from zaya_train.parallel.fsdp import GradientSums, shard, write_full
from zaya_train.parallel.sequence import Chunking, SharedRows

if TYPE_CHECKING:
    from zaya_train.config.schema import ModelConfig, TrainConfig
    from zaya_train.parallel.mesh import Mesh


def chunking_of(mesh: Mesh, config: TrainConfig) -> Chunking:
    """How the phase divides rows."""
    return Chunking(mesh.layout.context, config.parallel.context_chunks == "head_tail")


def parallelize(
    config: TrainConfig, model_config: ModelConfig, mesh: Mesh, device: torch.device
) -> ZayaModel:
    """Build on the meta device, shard, allocate the local part, initialise from run.seed.

    ConfigError before any of it where attention cannot run on `device` as configured, or the back
    end in C cannot be compiled.
    """
    _check_attention(config, device)
    if "native" in vars(config.kernels).values():
        library.ready()
    model = sharded_on_meta(config, model_config, mesh, device)
    model.to_empty(device=device)
    initialise(model, config.run.seed, write_full)
    return model


def _check_attention(config: TrainConfig, device: torch.device) -> None:
    dtype, backend = config.precision.compute_dtype, config.kernels.attention
    flash = backend in ("eager", "sdpa")
    if device.type != "cpu" and flash and DTYPES[dtype].itemsize != 2:
        raise ConfigError(REFUSAL.format(backend=backend, dtype=dtype, device=device.type))


def sharded_on_meta(
    config: TrainConfig, model_config: ModelConfig, mesh: Mesh, device: torch.device
) -> ZayaModel:
    """The model as this rank will hold it on `device`, without storage."""
    exchange: ContextExchange = WholeRows()
    dispatcher: TokenDispatcher = LocalDispatcher()
    if mesh.sparse is not None:
        dispatcher = AllToAllDispatcher(mesh.sparse.get_group("expert"))
    if mesh.layout.context > 1:
        exchange = SharedRows(mesh.context_group, chunking_of(mesh, config), device)
    sums = GradientSums()
    with torch.device("meta"):
        around = Surroundings(
            exchange,
            dispatcher,
            config.kernels,
            config.parallel.recompute,
            fp8_experts=config.precision.expert_dtype == "fp8",
            main_gradients=sums.of,
        )
        model = ZayaModel(model_config, around)
    shard(model, mesh, config.precision, config.parallel.reshard_after_forward)
    if config.kernels.grouped_mlp == "triton":
        sums.attach(model)
    register_fsdp_forward_method(model, "logits")
    return model
