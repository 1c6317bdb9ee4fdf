"""What is deleted, what is kept, and what happens when a step is reached twice."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from tests.faults.states import differing, make_mesh, plain_state, record, shard
from tests.helpers.distributed import run_ranks
from zaya_train.config.errors import CheckpointError, ConfigError, StorageError
from zaya_train.train import manifest as manifests
from zaya_train.train import storage
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.restore import load_full, verify

if TYPE_CHECKING:
    from pathlib import Path


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step-*"))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _save_many(root: Path, last: int, kept: int) -> None:
    store = CheckpointStore(root, keep_last=2)
    mesh = make_mesh()
    for step in range(1, last + 1):
        store.save(shard(plain_state(step), mesh), record(step, keep=step == kept))


def test_the_last_ones_and_phase_ends_stay(tmp_path: Path) -> None:
    run_ranks(_save_many, 2, tmp_path, 6, 3)
    assert _names(tmp_path) == ["step-00000003", "step-00000005", "step-00000006"]


def _save_with_every(root: Path) -> None:
    store = CheckpointStore(root, keep_last=2, keep_every_steps=4)
    mesh = make_mesh()
    for step in range(2, 13, 2):
        store.save(shard(plain_state(step), mesh), record(step))


def test_every_nth_stays_for_good(tmp_path: Path) -> None:
    run_ranks(_save_with_every, 2, tmp_path)
    assert _names(tmp_path) == [f"step-{step:08d}" for step in (4, 8, 10, 12)]


def test_fewer_than_two_are_not_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last=1: must be at least 2"):
        CheckpointStore(tmp_path, keep_last=1)


def _resume_and_save(root: Path, steps: list[int], seed_offset: int) -> str:
    store = CheckpointStore(root, keep_last=2)
    store.newest()
    mesh = make_mesh()
    try:
        for step in steps:
            store.save(shard(plain_state(step + seed_offset), mesh), record(step))
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_damaged_future_neither_counts_nor_vanishes(tmp_path: Path) -> None:
    """Steps 3 and 4 are good, 5 and 6 damaged: resuming from 4 may not lose 4 on saving 5."""
    run_ranks(_save_many, 2, tmp_path, 4, 0)
    for step in (5, 6):
        run_ranks(_resume_and_save, 2, tmp_path, [step], 0)
    assert _names(tmp_path) == ["step-00000005", "step-00000006"]
    run_ranks(_resume_and_save, 2, tmp_path / "other", [3, 4], 0)
    for step in (3, 4):
        (tmp_path / "other" / f"step-{step:08d}").rename(tmp_path / f"step-{step:08d}")
    for step in (5, 6):
        _flip(tmp_path / f"step-{step:08d}" / "__0_0.distcp")

    assert run_ranks(_resume_and_save, 2, tmp_path, [5], 0) == ["saved"] * 2
    assert _names(tmp_path) == [
        "step-00000004",
        "step-00000005",
        "step-00000005.bad",
        "step-00000006",
    ]
    assert differing(load_full(tmp_path / "step-00000005"), plain_state(5)) == []
    assert verify(tmp_path / "step-00000005.bad")
    _flip(tmp_path / "step-00000005" / "__0_0.distcp")
    assert run_ranks(_resume_and_save, 2, tmp_path, [5, 6, 7], 0) == ["saved"] * 2
    assert _names(tmp_path) == [
        "step-00000005.bad",
        "step-00000005.bad-2",
        "step-00000006",
        "step-00000006.bad",
        "step-00000007",
    ]


def test_the_same_step_with_the_same_values_stays_as_it_is(tmp_path: Path) -> None:
    run_ranks(_save_many, 2, tmp_path, 2, 0)
    before = (tmp_path / "step-00000002").stat().st_ino
    assert run_ranks(_resume_and_save, 2, tmp_path, [2], 0) == ["saved"] * 2
    assert (tmp_path / "step-00000002").stat().st_ino == before
    assert _names(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_same_step_with_other_values_is_refused(tmp_path: Path) -> None:
    run_ranks(_save_many, 2, tmp_path, 2, 0)
    for message in run_ranks(_resume_and_save, 2, tmp_path, [2], 5):
        assert "exists, verifies and holds other values than this run has at that step" in message
    assert _names(tmp_path) == ["step-00000001", "step-00000002"]
    assert differing(load_full(tmp_path / "step-00000002"), plain_state(2)) == []


def _end_the_phase_there(root: Path, other_mesh: bool) -> tuple[int, bool, dict[str, int], int]:
    """Save step 2's values again with the record of a phase's end; what `newest` gives then."""
    store = CheckpointStore(root, keep_last=2)
    found = store.newest()
    assert found is not None and found.record.phase_index == 0
    state = shard(plain_state(2), make_mesh(2 if other_mesh else 1))
    changes = {"phase_index": 1, "keep": True, "mesh": {"replicate": 2, "shard": 1}}
    store.save(state, record(2, **changes))
    again = store.newest()
    assert again is not None
    inode = (again.path / "__0_0.distcp").stat().st_ino
    return again.record.phase_index, again.record.keep, again.record.mesh, inode


@pytest.mark.parametrize("other_mesh", [False, True], ids=["same mesh", "other mesh"])
def test_the_same_step_and_values_with_another_record(tmp_path: Path, other_mesh: bool) -> None:
    """A run stopped at step 2 whose phase is then shortened to end at step 2."""
    run_ranks(_save_many, 2, tmp_path, 2, 0)
    path = tmp_path / "step-00000002"
    expected = (1, True, {"replicate": 1, "shard": 2}, (path / "__0_0.distcp").stat().st_ino)
    assert run_ranks(_end_the_phase_there, 2, tmp_path, other_mesh) == [expected] * 2
    assert _names(tmp_path) == ["step-00000001", "step-00000002"]
    assert differing(load_full(path), plain_state(2)) == []


def _refused_record(root: Path) -> str:
    store = CheckpointStore(root, keep_last=2)

    def refuse(_: Path) -> None:
        raise OSError(errno.EIO, "the disk's own words")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "sync_path", refuse)
        try:
            store.save(shard(plain_state(2), make_mesh()), record(2, phase_index=1))
        except StorageError as error:
            return str(error)
    return "saved"


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    run_ranks(_save_many, 2, tmp_path, 2, 0)
    for message in run_ranks(_refused_record, 2, tmp_path):
        assert "the disk's own words" in message
    assert verify(tmp_path / "step-00000002") == []
    assert manifests.read(tmp_path / "step-00000002").record.phase_index == 0


def _damage_then_heal(root: Path) -> list[str]:
    """A directory `newest` could not verify is moved aside even if it verifies again later."""
    store = CheckpointStore(root, keep_last=2)
    path = root / "step-00000002" / "__0_0.distcp"
    if dist.get_rank() == 0:
        _flip(path)
    dist.barrier()
    found = store.newest()
    assert found is not None
    assert found.record.step == 1
    if dist.get_rank() == 0:
        _flip(path)
    dist.barrier()
    store.save(shard(plain_state(9), make_mesh()), record(2))
    return _names(root)


def test_a_skipped_checkpoint_cannot_block_the_run_that_skipped_it(tmp_path: Path) -> None:
    run_ranks(_save_many, 2, tmp_path, 2, 0)
    expected = ["step-00000001", "step-00000002", "step-00000002.bad"]
    assert run_ranks(_damage_then_heal, 2, tmp_path) == [expected] * 2
    assert differing(load_full(tmp_path / "step-00000002"), plain_state(9)) == []


def test_a_damaged_checkpoint_does_not_count_among_the_kept(tmp_path: Path) -> None:
    run_ranks(_save_many, 2, tmp_path, 2, 0)
    run_ranks(_resume_and_save, 2, tmp_path / "other", [3], 0)
    (tmp_path / "other" / "step-00000003").rename(tmp_path / "step-00000003")
    _flip(tmp_path / "step-00000003" / "__0_0.distcp")
    assert run_ranks(_resume_and_save, 2, tmp_path, [4], 0) == ["saved"] * 2
    assert _names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_a_later_checkpoint_does_not_push_out_the_new_one(tmp_path: Path) -> None:
    run_ranks(_resume_and_save, 2, tmp_path, [8, 9, 3, 4, 5], 0)
    assert _names(tmp_path) == [f"step-{step:08d}" for step in (4, 5, 8, 9)]
