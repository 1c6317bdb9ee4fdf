"""Small states to save: sharded parameters and moments as FSDP2 leaves them, plain buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from zaya_train.train.manifest import CheckpointRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

MODEL = {"num_layers": 3, "hidden_size": 7, "rope_base": 1e4}


def make_mesh(replicate: int = 1) -> DeviceMesh:
    """(replicate, shard) over all ranks."""
    world_size = dist.get_world_size()
    return init_device_mesh(
        "cpu", (replicate, world_size // replicate), mesh_dim_names=("replicate", "shard")
    )


def plain_state(seed: int, layers: int = 3, width: int = 7) -> dict[str, Tensor]:
    """Whole tensors; 7 rows do not divide by 2 or 4, and one row leaves ranks without any."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    state: dict[str, Tensor] = {}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        state[f"{name}.attn.weight"] = randn(width, 5)
        state[f"{name}.norm.weight"] = randn(1)
        state[f"{name}.router.bias"] = randn(3)
        state[f"optim.muon.{name}.attn.weight.momentum"] = randn(width, 5).bfloat16()
    state["optim.step"] = torch.tensor(seed)
    return state


def is_plain(key: str) -> bool:
    """Buffers and counters stay plain CPU tensors, everything else is sharded."""
    return key.endswith((".bias", ".step"))


def shard(state: Mapping[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """The state on a mesh; parameters as Parameters, as a module holds them."""
    placements = [Replicate(), Shard(0)]
    sharded: dict[str, Tensor] = {}
    for key, value in state.items():
        tensor = value if is_plain(key) else distribute_tensor(value, mesh, placements)
        is_parameter = key.endswith(".weight")
        sharded[key] = torch.nn.Parameter(tensor) if is_parameter else tensor
    return sharded


def blank(state: Mapping[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """A state of the same shapes with other values."""
    return shard({key: torch.full_like(value, 77) for key, value in state.items()}, mesh)


def differing(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Keys whose whole values are not bitwise those expected. Collective for DTensors."""
    bad = sorted(state.keys() ^ expected.keys())
    for key in sorted(state.keys() & expected.keys()):
        value = state[key].detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if whole.dtype != expected[key].dtype or not torch.equal(whole, expected[key]):
            bad.append(key)
    return bad


def record(step: int, **changes: Any) -> CheckpointRecord:
    values: dict[str, Any] = {
        "step": step,
        "phase_name": "pretrain",
        "phase_index": 0,
        "train_state": {"tokens": step * 128, "loss": 0.1 * step},
        "model": MODEL,
        "mesh": {"replicate": 1, "shard": 2},
        "config_hash": "c0ffee",
        "lineage": {"seed": 0, "phases": [], "corpora": {}},
    }
    return CheckpointRecord(**{**values, **changes})
