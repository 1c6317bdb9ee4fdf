"""Muon beside microsoft/dion's (MIT), where that can be imported; it is no dependency.

    git clone https://github.com/microsoft/dion
    TORCHDYNAMO_DISABLE=1 PYTHONPATH=.:kernels:dion python -m pytest tests/dist/test_dion.py -s

Figures are in docs/lab-log.md. dion hands its directions to Newton-Schulz in bf16 and scales the
result by the learning rate in the dtype it gets, so gradients here are such that directions are
exact in bf16 (small integers, momentum 1/2, three steps), and its Newton-Schulz is ours, handed
back in fp32. What is compared is everything else: momentum, exchange, ownership, scale, decay.
With ordinary gradients the rounding of directions goes through five quintic steps in bf16, whose
own error is 2.5 %.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import Parameter
from zaya_kernels.newton_schulz.op import FIVE_QUINTICS, newton_schulz

from tests.dist.harness import relative
from tests.dist.muon_ranks import UNEVEN, Grid, distributed, randn
from tests.helpers.distributed import run_ranks
from zaya_train.config.derive import Layout
from zaya_train.config.schema import MuonConfig
from zaya_train.optim.exchange import Groups
from zaya_train.optim.muon import Muon
from zaya_train.optim.shards import Shard
from zaya_train.optim.table import MATRIX, PER_EXPERT
from zaya_train.parallel.mesh import Mesh

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

dion = pytest.importorskip(
    "dion", reason="microsoft/dion is not importable (the docstring says how)"
)
if os.environ.get("TORCHDYNAMO_DISABLE") != "1":
    pytest.skip("dion compiles its steps; set TORCHDYNAMO_DISABLE=1", allow_module_level=True)

STEPS = 3
RATE, MOMENTUM, DECAY = 0.1, 0.5, 0.1


def gradient(shape: tuple[int, ...], step: int, number: int, exact: bool) -> Tensor:
    values = randn(shape, 1000 * (step + 1) + number)
    return (4 * values).round().clamp(-8, 8) if exact else values


def ours(parameters: list[Parameter], mesh: Mesh) -> Any:
    shards = [Shard.of(f"p{i}", p) for i, p in enumerate(parameters)]
    views = [PER_EXPERT if p.dim() == 3 else MATRIX for p in parameters]
    config = MuonConfig(learning_rate=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    groups = Groups(mesh.fsdp_group, mesh.sharding.get_group("replicate"))
    muon = Muon(shards, views, [True] * len(shards), config, groups, "eager")
    return lambda: muon.step(RATE)


def theirs(parameters: list[Parameter], mesh: Mesh) -> Any:
    def ours_in_bf16(x: Tensor, epsilon: float) -> Tensor:
        flat = x.reshape(-1, *x.shape[-2:]).float()
        return newton_schulz(flat, FIVE_QUINTICS, torch.bfloat16, "eager").view(x.shape)

    muon = dion.Muon(
        parameters,
        distributed_mesh=mesh.sharding["fsdp"],
        lr=RATE,
        mu=MOMENTUM,
        weight_decay=DECAY,
        nesterov=True,
        adjust_lr="rms_norm",
        newton_schulz_func=ours_in_bf16,
    )
    return muon.step


def weights_after(grid: Grid, mesh: Mesh, make: Any, exact: bool) -> list[NDArray[Any]]:
    parameters = [
        Parameter(distributed(randn(shape, i), grid, mesh)) for i, shape in enumerate(grid.shapes)
    ]
    step = make(parameters, mesh)
    with torch.no_grad():
        for number in range(STEPS):
            for i, parameter in enumerate(parameters):
                full = gradient(grid.shapes[i], number, i, exact)
                parameter.grad = distributed(full, grid, mesh)
            step()
        return [p.full_tensor().numpy() for p in parameters]  # type: ignore[attr-defined]


def differences(grid: Grid, exact: bool) -> list[float]:
    """Of each parameter, relative to how far it moved."""
    mesh = Mesh.build(Layout(grid.replicate, grid.shard, 1), "cpu")
    both = [weights_after(grid, mesh, make, exact) for make in (ours, theirs)]
    starts = [randn(shape, i).numpy() for i, shape in enumerate(grid.shapes)]
    return [relative(a - start, b - start) for a, b, start in zip(*both, starts, strict=True)]


@pytest.mark.parametrize("grid", [Grid(shard=4), Grid(replicate=2, shard=2)])
@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-6), (False, 0.03)])
def test_the_same_numbers_as_dion(grid: Grid, exact: bool, tolerance: float) -> None:
    assert grid.shapes == UNEVEN
    found = run_ranks(differences, grid.world, grid, exact)[0]
    print(grid.name, "exact" if exact else "rounded", [f"{d:.1e}" for d in found])
    assert max(found) <= tolerance
