"""The counters of bytes see every way of sending something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.dist.muon_ranks import Traffic as MuonTraffic
from tests.helpers.distributed import run_ranks
from tests.helpers.traffic import Traffic
from zaya_train.config.derive import Layout
from zaya_train.optim.exchange import Groups
from zaya_train.parallel.mesh import Mesh

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh


def full_tensor(mesh: DeviceMesh, x: Tensor) -> object:
    return distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None).full_tensor()


def dtensor_sum(mesh: DeviceMesh, x: Tensor) -> object:
    total = distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None).sum()
    return total.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]


def inside_a_dtensors_dispatch(mesh: DeviceMesh, x: Tensor) -> object:
    # A root needs the whole sum first.
    return distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None).sum().sqrt()


def functional_all_reduce(mesh: DeviceMesh, x: Tensor) -> object:
    return funcol.all_reduce(x, "sum", mesh.get_group()).sum()


def functional_all_gather(mesh: DeviceMesh, x: Tensor) -> object:
    return funcol.all_gather_tensor(x, 0, mesh.get_group()).sum()


def functional_reduce_scatter(mesh: DeviceMesh, x: Tensor) -> object:
    return funcol.reduce_scatter_tensor(x, "sum", 0, mesh.get_group()).sum()


def functional_all_to_all(mesh: DeviceMesh, x: Tensor) -> object:
    return funcol.all_to_all_single(x, [2, 2], [2, 2], mesh.get_group()).sum()


def autograd_all_to_all(mesh: DeviceMesh, x: Tensor) -> object:
    x.requires_grad_()
    out = funcol.all_to_all_single_autograd(x, [2, 2], [2, 2], mesh.get_group())
    return out.sum()


def plain_all_reduce(mesh: DeviceMesh, x: Tensor) -> object:
    return dist.all_reduce(x, group=mesh.get_group())


# x: [4, 3] fp32, 48 bytes.
WAYS = [
    (full_tensor, "all_gather", 24),
    (dtensor_sum, "all_reduce", 4),
    (inside_a_dtensors_dispatch, "all_reduce", 4),
    (functional_all_reduce, "all_reduce", 48),
    (functional_all_gather, "all_gather", 48),
    (functional_reduce_scatter, "reduce_scatter", 48),
    (functional_all_to_all, "all_to_all", 48),
    (autograd_all_to_all, "all_to_all", 48),
    (plain_all_reduce, "all_reduce", 48),
]


def counted(way: Callable[[DeviceMesh, Tensor], object]) -> tuple[object, object]:
    """What both counters see of a way, each in a call of its own."""
    mesh = init_device_mesh("cpu", (2,))
    sharding = Mesh.build(Layout(1, 2, 1), "cpu").sharding
    groups = Groups(sharding.get_group("fsdp"), sharding.get_group("replicate"))
    with Traffic() as all_bytes:
        way(mesh, torch.ones(4, 3))
    with MuonTraffic(groups) as others:
        way(mesh, torch.ones(4, 3))
    return dict(all_bytes.operands), others.sent_bytes


@pytest.mark.parametrize(("way", "kind", "size"), WAYS, ids=[way.__name__ for way, _, _ in WAYS])
def test_every_way_is_counted(
    way: Callable[[DeviceMesh, Tensor], object], kind: str, size: int
) -> None:
    for operands, others in run_ranks(counted, 2, way):
        assert operands == {(kind, (0, 1)): [size]}
        assert others == {kind: size}


def unknown_ones() -> list[str]:
    refused = []
    x = torch.ones(4)
    group = dist.group.WORLD
    assert group is not None
    for send in (
        lambda: dist.broadcast(x, 0),
        lambda: dist.all_gather([x, x], x),
        lambda: funcol.broadcast(x, 0, group),
        lambda: funcol.all_reduce_coalesced([x], "sum", group),
    ):
        try:
            with Traffic():
                send()
        except KeyError as error:
            refused.append(str(error.args[0]))
    return refused


def test_unknown_operators_are_refused() -> None:
    names = ["broadcast_", "allgather_", "broadcast", "all_reduce_coalesced"]
    assert run_ranks(unknown_ones, 2) == [names] * 2
