"""Process groups of a mesh."""

from __future__ import annotations

import pytest
from torch.distributed import distributed_c10d

from tests.helpers.distributed import run_ranks
from zaya_train.config.derive import Layout
from zaya_train.parallel.mesh import Mesh


def groups_made(layout: Layout) -> tuple[int, int, bool]:
    """Groups a mesh adds to the process, those it names, whether replicas share one."""
    before = len(distributed_c10d._world.pg_map)
    mesh = Mesh.build(layout, "cpu")
    views = [mesh.device_mesh, mesh.sharding, *([mesh.sparse] if mesh.sparse else [])]
    shared = len({id(view.get_group("replicate")) for view in views}) == 1
    return len(distributed_c10d._world.pg_map) - before, len(mesh.groups), shared


@pytest.mark.parametrize(
    ("layout", "axes", "new"),
    [
        (Layout(2, 1, 2), 4, 4),
        # One fsdp group of all ranks is the world's own.
        (Layout(1, 2, 2, 2), 6, 5),
        (Layout(2, 2, 1, 2), 6, 6),
    ],
)
def test_every_axis_has_one_group(layout: Layout, axes: int, new: int) -> None:
    """Replicate, fsdp, shard, context; with experts also expert_shard and expert."""
    for outcome in run_ranks(groups_made, 4, layout):
        assert outcome == (new, axes, True)
