"""A rank that dies or hangs in a collective is named, with axis and rule, within the timeout."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from tests.dist.harness import Case, Setup
from tests.helpers.distributed import PATIENCE_SECONDS, ranks_running, run_ranks
from zaya_train.config.derive import Layout
from zaya_train.config.errors import LostRankError
from zaya_train.parallel.mesh import Mesh
from zaya_train.runtime.dist import shorten_timeouts
from zaya_train.runtime.lost import naming_lost_ranks

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_SECONDS = 4.0
"""Counted from a moment when all ranks have met, so that only the lost one can exceed it."""


def train_and_lose(case: Case, lost: int, how: str, folder: Path) -> None:
    """Steps on every rank until `lost` goes; what the others' reports say, in files."""
    setup = Setup.of(case)
    setup.step(0)

    def meet_and_lose(*_: object) -> None:
        dist.barrier()
        shorten_timeouts(LIMIT_SECONDS, setup.mesh.groups)
        if dist.get_rank() == lost:
            go(how)

    layer = setup.model.layers[1].get_submodule("moe")
    layer.register_forward_pre_hook(meet_and_lose)
    try:
        with naming_lost_ranks(setup.mesh.layout, LIMIT_SECONDS):
            setup.step(1)
    except LostRankError as error:
        (folder / f"{dist.get_rank()}.part").write_text(str(error))
        (folder / f"{dist.get_rank()}.part").rename(folder / f"{dist.get_rank()}")
        os._exit(1)  # as `fail_fast` does


def go(how: str) -> None:
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.parametrize("how", ["dies", "hangs"])
@pytest.mark.parametrize(
    ("case", "axes"),
    [
        (Case(shard=4, expert=2), {0: "fsdp, expert_shard", 1: "fsdp", 3: "fsdp, expert"}),
        (Case(2, 1, 2), {0: "replicate", 3: "fsdp, context"}),
    ],
    ids=["experts", "replicas"],
)
def test_the_lost_rank_is_named_by_every_other(
    case: Case, axes: dict[int, str], how: str, tmp_path: Path
) -> None:
    with ranks_running(train_and_lose, 4, case, 2, how, tmp_path):
        deadline = time.monotonic() + PATIENCE_SECONDS
        wanted = {"0", "1", "3"}
        while time.monotonic() < deadline and not wanted <= {p.name for p in tmp_path.iterdir()}:
            time.sleep(0.1)
    reports = {int(p.name): p.read_text() for p in tmp_path.iterdir() if not p.suffix}
    assert reports.keys() == {0, 1, 3}
    for rank, text in reports.items():
        assert re.search(r"no word from .*rank 2 \(shares ", text), text
        assert "within 4 s (runtime.step_timeout_seconds): " in text and "\n" not in text
        if rank in axes:
            assert f"rank 2 (shares axis {axes[rank]})" in text


@pytest.mark.parametrize(
    ("layout", "other", "axes"),
    [
        (Layout(2, 2, 2, 2), 1, ["fsdp", "context", "expert"]),
        (Layout(2, 2, 2, 2), 2, ["fsdp", "expert_shard"]),
        (Layout(2, 2, 2, 2), 4, ["replicate"]),
        (Layout(2, 2, 2, 2), 7, []),
        (Layout(1, 4, 1, 4), 3, ["fsdp", "expert"]),
        (Layout(1, 1, 4, 2), 3, ["fsdp", "context"]),
    ],
)
def test_shared_axes_by_hand(layout: Layout, other: int, axes: list[str]) -> None:
    assert layout.shared_axes(0, other) == axes
    assert layout.shared_axes(other, 0) == axes


def test_other_errors_pass() -> None:
    with (
        pytest.raises(RuntimeError, match="a bug"),
        naming_lost_ranks(Layout(1, 1, 1), LIMIT_SECONDS),
    ):
        raise RuntimeError("a bug")


def groups_of(layout: Layout) -> dict[str, list[int]]:
    mesh = Mesh.build(layout, "cpu")
    views = [view for view in (mesh.device_mesh, mesh.sharding, mesh.sparse) if view is not None]
    return {
        axis: dist.get_process_group_ranks(view.get_group(axis))
        for view in views
        for axis in view.mesh_dim_names or ()
    }


@pytest.mark.parametrize("layout", [Layout(2, 2, 1, 2), Layout(1, 2, 2, 2), Layout(2, 1, 2)])
def test_shared_axes_are_the_meshs_groups(layout: Layout) -> None:
    for rank, groups in enumerate(run_ranks(groups_of, 4, layout)):
        for other in range(4):
            shared = {axis for axis, ranks in groups.items() if other in ranks} - {"shard"}
            assert set(layout.shared_axes(rank, other)) == shared
