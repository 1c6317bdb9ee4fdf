"""The one object that owns process groups.

World ranks form a mesh of axes, slowest first:

    replicate   whole copies of the sharded parameters (HSDP); gradients are all-reduced over it
    shard       ranks that share the parameters and read different rows
    context     ranks that share the parameters and hold parts of the same row

world = replicate x shard x context. Derived groups:

    fsdp        shard x context, flattened: parameters are sharded over it, gradients are
                reduce-scattered (summed) over it
    data        replicate x shard: ranks that read different rows; rank number in it says which

A rank's context peers are neighbours in world order, so they share a node when the degree divides
the ranks of a node. `config.check` refuses degrees that do not divide; nothing here checks again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from zaya_train.config.derive import Layout


@dataclass(frozen=True)
class Mesh:
    """See the module's docstring, which is the specification."""

    layout: Layout
    device_mesh: DeviceMesh
    """Axes (replicate, shard, context)."""
    sharding: DeviceMesh
    """The same ranks as axes (replicate, fsdp)."""

    @staticmethod
    def build(layout: Layout, device_type: str) -> Mesh:
        """Collective over the world."""
        world = init_device_mesh(device_type, (layout.world,), mesh_dim_names=("world",))
        axes = ("replicate", "shard", "context")
        sizes = (layout.replicate, layout.shard, layout.context)
        group = (layout.replicate, layout.shard * layout.context)
        # Private in torch 2.13, and what torchtitan uses: both views share one root mesh, which
        # FSDP and distributed checkpoints require.
        return Mesh(
            layout,
            world._unflatten(0, sizes, axes),
            world._unflatten(0, group, ("replicate", "fsdp")),
        )

    @property
    def fsdp(self) -> DeviceMesh:
        """What `fully_shard` takes: (fsdp,) or, with replicas, (replicate, fsdp)."""
        return self.sharding["fsdp"] if self.layout.replicate == 1 else self.sharding

    @property
    def groups(self) -> list[ProcessGroup]:
        """Every group that training communicates over, besides the world."""
        named = [self.device_mesh.get_group(axis) for axis in ("replicate", "shard", "context")]
        return [*named, *(self.sharding.get_group(axis) for axis in ("replicate", "fsdp"))]

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
