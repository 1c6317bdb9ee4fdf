"""Muon on parameters of many kinds, with given gradients, on any grid of ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.traffic import collective, of_dtensors
from zaya_train.config.derive import Layout
from zaya_train.config.schema import MuonConfig
from zaya_train.optim import owners
from zaya_train.optim.exchange import Groups
from zaya_train.optim.muon import Muon
from zaya_train.optim.shards import Shard as LocalShard
from zaya_train.optim.table import MATRIX, PER_EXPERT
from zaya_train.parallel.collectives import row_counts
from zaya_train.parallel.mesh import Mesh

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.distributed.device_mesh import DeviceMesh

STEPS = 4
Shapes = tuple[tuple[int, ...], ...]
EVEN: Shapes = ((8, 12), (16, 8), (8, 12), (4, 12, 14), (8, 14, 10))
"""Every rank of up to four holds the same, and stacks are the larger part: none need move."""
UNEVEN: Shapes = (
    (13, 20),
    (17, 8),
    # Fewer rows than ranks.
    (3, 8),
    (13, 20),
    (40, 24),
    # Two, two, one and no matrices on four ranks; of the last stack half of them hold none.
    (5, 6, 10),
    (8, 4, 4),
    (2, 9, 6),
)

EXPERTS: Shapes = ((13, 20), (6, 6, 10), (2, 9, 6))
"""Stacks that two expert ranks share evenly and their expert_shard ranks do not."""


@dataclass(frozen=True)
class Grid:
    """replicate x shard ranks; with `expert`, stacks are dealt as expert parallelism deals them."""

    replicate: int = 1
    shard: int = 1
    expert: int = 1
    dtype: str = "fp32"
    momentum_dtype: str = "fp32"
    shapes: Shapes = UNEVEN
    round_elements: int = 2**26

    @property
    def world(self) -> int:
        return self.replicate * self.shard

    @property
    def name(self) -> str:
        degrees = f"r{self.replicate}s{self.shard}e{self.expert}"
        kind = {EVEN: "even", UNEVEN: "uneven", EXPERTS: "experts"}[self.shapes]
        return f"{degrees}-{self.dtype}-{self.momentum_dtype}-{kind}-{self.round_elements}"


@dataclass(frozen=True, repr=False)
class Outcome:
    """What one rank saw."""

    weights: list[NDArray[Any]]
    momenta: list[NDArray[Any]]
    digest: str
    """Of this rank's own bits, weights and momenta."""
    column: int
    sent_bytes: dict[str, int]
    """Per step, by what was sent: to other ranks of the replica, to replicas, anything else."""
    planned: tuple[int, int, int]
    """`owners.traffic` of this rank."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that this rank hands to collectives for other ranks, by group."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.groups = groups
        self.sent_bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if of_dtensors(types):
            return NotImplemented
        if found := collective(func, args):
            kind, group, operand = found
            count = operand.numel() * operand.element_size()
            if kind == "all_to_all" and str(func).startswith("c10d.alltoall_base_"):
                known = {
                    self.groups.fsdp.group_name: "fsdp",
                    self.groups.replicate.group_name: "copies",
                }
                splits = args[4]
                kind = known[group.group_name]
                count = (sum(splits) - splits[group.rank()]) * operand.element_size()
            self.sent_bytes[kind] = self.sent_bytes.get(kind, 0) + count
        return func(*args, **(kwargs or {}))


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distributed(full: Tensor, grid: Grid, mesh: Mesh) -> DTensor:
    """This rank's part, sharded along dim 0 over the fsdp ranks."""
    if grid.expert > 1 and full.dim() == 3:
        return _as_experts(full, grid, mesh)
    rank = mesh.fsdp_group.rank()
    rows = row_counts(full.shape[0], grid.shard)
    local = full[sum(rows[:rank]) :][: rows[rank]].clone()
    return _dtensor(local, full, mesh.sharding, (Replicate(), Shard(0)))


def _as_experts(full: Tensor, grid: Grid, mesh: Mesh) -> DTensor:
    """Placements (Replicate, _StridedShard(0), Shard(0)) on (replicate, expert_shard, expert): a
    block of experts per expert rank, its rows dealt to the expert_shard ranks, so that a column's
    rows do not lie at its place in the column order."""
    expert_shard = grid.shard // grid.expert
    experts = mesh.sharding._unflatten(1, (expert_shard, grid.expert), ("expert_shard", "expert"))
    sharded, expert = divmod(mesh.fsdp_group.rank(), grid.expert)
    block = full.chunk(grid.expert)[expert]
    rows = row_counts(block.shape[0], expert_shard)
    local = block[sum(rows[:sharded]) :][: rows[sharded]].clone()
    placements = (Replicate(), _StridedShard(0, split_factor=grid.expert), Shard(0))
    return _dtensor(local, full, experts, placements)


def _dtensor(local: Tensor, full: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def muon_config(grid: Grid) -> MuonConfig:
    return MuonConfig(
        learning_rate=0.1,
        newton_schulz_dtype=grid.dtype,  # type: ignore[arg-type]
        momentum_dtype=grid.momentum_dtype,  # type: ignore[arg-type]
    )


@torch.no_grad()
def some_steps(grid: Grid, backend: str = "eager") -> Outcome:
    """A few steps with the same full gradients on every grid; runs on all its ranks."""
    owners.ROUND_ELEMENTS = grid.round_elements
    mesh = Mesh.build(Layout(grid.replicate, grid.shard, 1), "cpu")
    groups = Groups(mesh.fsdp_group, mesh.sharding.get_group("replicate"))
    shards = [
        LocalShard.of(f"p{i}", Parameter(distributed(randn(shape, i), grid, mesh)))
        for i, shape in enumerate(grid.shapes)
    ]
    views = [PER_EXPERT if len(shape) == 3 else MATRIX for shape in grid.shapes]
    muon = Muon(shards, views, [True] * len(shards), muon_config(grid), groups, backend)
    with Traffic(groups) as sent:
        for step in range(STEPS):
            _give_gradients(shards, grid, mesh, step)
            muon.step(0.1 / (step + 1))
    sha = hashlib.sha256()
    for tensor in [shard.local for shard in shards] + muon.momentum:
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    pairs = zip(shards, muon.momentum, strict=True)
    return Outcome(
        weights=[shard.parameter.full_tensor().numpy() for shard in shards],  # type: ignore[attr-defined]
        momenta=[_full(shard.as_full(momentum)) for shard, momentum in pairs],
        digest=sha.hexdigest(),
        column=groups.fsdp.rank(),
        sent_bytes={kind: count // STEPS for kind, count in sent.sent_bytes.items()},
        planned=owners.traffic(
            muon.plan, owners.Owner(groups.replicate.rank(), groups.fsdp.rank())
        ),
    )


def _give_gradients(shards: list[LocalShard], grid: Grid, mesh: Mesh, step: int) -> None:
    for i, shard in enumerate(shards):
        # One took no part in the second step's loss.
        missing = step == 1 and i == 1
        full = randn(grid.shapes[i], 1000 * (step + 1) + i)
        shard.parameter.grad = None if missing else distributed(full, grid, mesh)


def _full(tensor: Tensor) -> NDArray[Any]:
    assert isinstance(tensor, DTensor)
    whole = tensor.full_tensor()
    return whole.float().numpy()


def run_grids(grids: list[Grid]) -> dict[str, Outcome]:
    """Every grid in turn on the ranks of this world."""
    outcomes = {}
    for grid in grids:
        outcomes[grid.name] = some_steps(grid)
        dist.barrier()
    return outcomes


def replicas_that_differ() -> None:
    """Two replicas, one with a matrix more in its stack."""
    mesh = Mesh.build(Layout(2, 1, 1), "cpu")
    groups = Groups(mesh.fsdp_group, mesh.sharding.get_group("replicate"))
    stack = Parameter(torch.zeros(3 + groups.replicate.rank(), 2, 2))
    Muon([LocalShard.of("p", stack)], [PER_EXPERT], [True], muon_config(Grid()), groups, "eager")
