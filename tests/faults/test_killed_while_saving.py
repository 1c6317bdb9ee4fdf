"""SIGKILL at any moment of a save leaves whole checkpoints or directories that do not count."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from tests.faults.states import differing, make_mesh, plain_state, record, shard
from tests.helpers.distributed import PATIENCE_SECONDS, ranks_running, run_ranks
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.restore import find_newest, load_full, verify

if TYPE_CHECKING:
    from pathlib import Path

KILLS = 6
WIDTH = 20_000  # about 2.4 MB per save, so that writing takes a share of the time


def _save_for_ever(root: Path) -> None:
    store = CheckpointStore(root, keep_last=2)
    found = store.newest()
    step = found.record.step if found else 0
    mesh = make_mesh()
    while True:
        step += 1
        store.save(shard(plain_state(step, width=WIDTH), mesh), record(step))


def test_kill_all_ranks_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    newest = 0
    for _ in range(KILLS):
        with ranks_running(_save_for_ever, 2, tmp_path) as processes:
            _wait_for_step(tmp_path, newest + 3)
            time.sleep(rng.random() * 0.3)
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        _check(tmp_path)
        found, skipped = find_newest(tmp_path)
        assert found is not None
        assert skipped == {}, "the newest by name was complete"
        assert found.record.step >= newest + 3
        newest = found.record.step


def _wait_for_step(root: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if any(int(path.name[5:]) >= step for path in root.glob("step-????????")):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not saved: {sorted(p.name for p in root.iterdir())}")


def _check(root: Path) -> None:
    for path in root.glob("step-*"):
        if re.fullmatch(r"step-\d{8}\.(tmp|trash)", path.name):
            continue
        assert re.fullmatch(r"step-\d{8}", path.name), path.name
        assert verify(path) == []
        expected = plain_state(int(path.name[5:]), width=WIDTH)
        assert differing(load_full(path), expected) == []


def _die_at_sync(root: Path, number: int) -> None:
    """Rank 0 kills itself right before the `number`-th fsync of its third save."""
    store = CheckpointStore(root, keep_last=2)
    mesh = make_mesh()
    store.save(shard(plain_state(1), mesh), record(1))
    store.save(shard(plain_state(2), mesh), record(2))
    real_fsync, calls = os.fsync, 0

    def fsync(fd: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real_fsync(fd)

    if dist.get_rank() == 0:
        os.fsync = fsync
    store.save(shard(plain_state(3), mesh), record(3))


def _resume(root: Path) -> tuple[int, list[str], list[str]]:
    store = CheckpointStore(root, keep_last=2)
    found = store.newest()
    assert found is not None
    step = found.record.step
    bad = differing(load_full(found.path), plain_state(step))
    return step, bad, sorted(path.name for path in root.glob("step-*.*"))


SYNCS = ["data file", ".metadata", "MANIFEST.json", "its directory", "the root after the rename"]


@pytest.mark.parametrize("number", range(1, len(SYNCS) + 1), ids=lambda n: SYNCS[n - 1])
def test_kill_at_every_point_of_durability(tmp_path: Path, number: int) -> None:
    with ranks_running(_die_at_sync, 2, tmp_path, number) as processes:
        for process in processes:
            process.join(PATIENCE_SECONDS)
        assert processes[0].exitcode == -signal.SIGKILL, "the save has fewer syncs than listed"
    before = {path.name for path in tmp_path.glob("step-*")}
    assert {"step-00000001", "step-00000002"} <= before, "retention ran before verification"
    renamed = number == len(SYNCS)
    assert ("step-00000003" in before) == renamed
    assert ("step-00000003.tmp" in before) == (not renamed)
    for step, bad, leftovers in run_ranks(_resume, 2, tmp_path):
        assert step == (3 if renamed else 2)
        assert bad == []
        assert leftovers == []


def _second_writer(root: Path) -> str:
    try:
        CheckpointStore(root, keep_last=2, lock_wait_seconds=0.3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


def _hold(root: Path) -> None:
    store = CheckpointStore(root, keep_last=2)
    (root / "ready").touch()
    time.sleep(PATIENCE_SECONDS)
    store.close()


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    with ranks_running(_hold, 1, tmp_path) as processes:
        while not (tmp_path / "ready").exists():
            assert processes[0].is_alive()
            time.sleep(0.01)
        (tmp_path / "step-00000004.tmp").mkdir()
        for said in run_ranks(_second_writer, 2, tmp_path):
            assert said.startswith("StorageError: ")
            assert f"another run writes checkpoints here (process {processes[0].pid} on" in said
        assert (tmp_path / "step-00000004.tmp").exists(), "a live writer's work was removed"
    assert run_ranks(_second_writer, 2, tmp_path) == ["opened", "opened"]
    assert not (tmp_path / "step-00000004.tmp").exists()
