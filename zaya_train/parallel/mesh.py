"""The one object that owns process groups.

World ranks form a mesh of axes, slowest first:

    replicate   whole copies of the sharded parameters (HSDP); gradients are all-reduced over it
    shard       ranks that share the parameters and read different rows
    context     ranks that share the parameters and hold parts of the same row

world = replicate x shard x context. Derived groups:

    fsdp        shard x context, flattened: parameters are sharded over it, gradients are
                reduce-scattered (summed) over it
    data        replicate x shard: ranks that read different rows; rank number in it says which

Experts see the same ranks otherwise (the sparse view). The fsdp group, in its order, is divided as

    expert_shard   ranks that hold parts of the same experts and gather them from each other
    expert         ranks that hold different experts and exchange tokens; fastest, so neighbours

fsdp = expert_shard x expert. An expert's weights are divided along their first dimension, first
over expert (whole experts, E / expert each), then over expert_shard; where expert_shard exceeds
E / expert, the last ranks hold no rows of them.

What the optimizer relies on: every tensor, dense or expert, is partitioned over the ranks of one
fsdp group, and ranks of one replicate group hold the same part. So one exchange over the fsdp
group gives whole matrices, and one sum of every rank's squares a norm, whatever the degrees.

A rank's context peers and its expert peers are neighbours in world order, so they share a node when
the degree divides the ranks of a node. `config.check` refuses degrees that do not divide, without a
process group; nothing here checks again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from zaya_train.config.derive import Layout

DENSE_AXES = ("replicate", "shard", "context")
SPARSE_AXES = ("replicate", "expert_shard", "expert")


@dataclass(frozen=True)
class Mesh:
    """See the module's docstring, which is the specification."""

    layout: Layout
    device_mesh: DeviceMesh
    """Axes (replicate, shard, context)."""
    sharding: DeviceMesh
    """The same ranks as axes (replicate, fsdp)."""
    sparse: DeviceMesh | None
    """The same ranks as axes (replicate, expert_shard, expert); None without expert parallelism."""

    @staticmethod
    def build(layout: Layout, device_type: str) -> Mesh:
        """Collective over the world."""
        world = init_device_mesh(device_type, (layout.world,), mesh_dim_names=("world",))
        dense = (layout.shard, layout.context)
        sparse = (layout.expert_shard, layout.expert)
        # Private in torch 2.13, and what torchtitan uses: all views share one root mesh, which
        # FSDP and distributed checkpoints require, and here one replicate group too.
        sharding = world._unflatten(0, (layout.replicate, layout.fsdp), ("replicate", "fsdp"))
        return Mesh(
            layout,
            sharding._unflatten(1, dense, DENSE_AXES[1:]),
            sharding,
            sharding._unflatten(1, sparse, SPARSE_AXES[1:]) if layout.expert > 1 else None,
        )

    @property
    def fsdp(self) -> DeviceMesh:
        """What `fully_shard` takes: (fsdp,) or, with replicas, (replicate, fsdp)."""
        return self.sharding["fsdp"] if self.layout.replicate == 1 else self.sharding

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """What `fully_shard` takes for experts; only under expert parallelism."""
        assert self.sparse is not None
        if self.layout.replicate == 1:
            return self.sparse["expert_shard"]
        return self.sparse["replicate", "expert_shard"]

    def named_groups(self) -> list[tuple[str, ProcessGroup]]:
        """Axes with this rank's groups; axes of the same ranks may share one."""
        views = [(self.device_mesh, DENSE_AXES), (self.sharding, ("replicate", "fsdp"))]
        if self.sparse is not None:
            views.append((self.sparse, SPARSE_AXES))
        return [(axis, view.get_group(axis)) for view, axes in views for axis in axes]

    @property
    def groups(self) -> list[ProcessGroup]:
        """Every group that training communicates over, besides the world."""
        return list(dict.fromkeys(group for _, group in self.named_groups()))

    @property
    def context_group(self) -> ProcessGroup:
        """Ranks that hold parts of this rank's row."""
        return self.device_mesh.get_group("context")

    @property
    def context_rank(self) -> int:
        return self.device_mesh.get_local_rank("context")

    @property
    def fsdp_group(self) -> ProcessGroup:
        """Ranks among which this rank's parameters are sharded."""
        return self.sharding.get_group("fsdp")

    @property
    def data_rank(self) -> int:
        """0 .. layout.data - 1: which rows of a step this rank reads."""
        replicate = self.device_mesh.get_local_rank("replicate")
        return replicate * self.layout.shard + self.device_mesh.get_local_rank("shard")
