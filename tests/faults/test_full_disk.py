"""The file system refuses on one rank: all ranks fail the save alike and can go on.

RLIMIT_FSIZE makes the kernel refuse (EFBIG) where a full disk would (ENOSPC): real write errors, in
the middle of a file, on one rank only.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from tests.faults.states import differing, make_mesh, plain_state, record, shard
from tests.helpers.distributed import run_ranks
from zaya_train.config.errors import StorageError
from zaya_train.config.schema import CheckpointConfig
from zaya_train.train import storage
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.metrics import METRICS_FILE, MetricsWriter, iter_rows
from zaya_train.train.restore import load_full
from zaya_train.train.saving import Saver

if TYPE_CHECKING:
    from pathlib import Path

    import torch

NAMES_AFTER_FAILURE = ["step-00000001", "step-00000002"]


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step-*"))


def _failing_save(
    store: CheckpointStore,
    state: dict[str, torch.Tensor],
    failing_rank: int,
    limit_bytes: int,
    **changes: Any,
) -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        store.save(state, record(3, **changes))
    except StorageError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return "saved"


def _fail_then_go_on(
    root: Path, failing_rank: int, limit_bytes: int, changes: dict[str, Any], width: int
) -> tuple[str, list[str], list[str]]:
    store = CheckpointStore(root, keep_last=2)
    mesh = make_mesh()
    for step in (1, 2):
        store.save(shard(plain_state(step), mesh), record(step))
    state = shard(plain_state(3, width=width), mesh)
    message = _failing_save(store, state, failing_rank, limit_bytes, **changes)
    dist.barrier()
    after_failure = _names(root)
    dist.barrier()
    store.save(state, record(3))
    found = store.newest()
    assert found is not None
    assert found.record.step == 3
    return message, after_failure, differing(load_full(found.path), plain_state(3, width=width))


@pytest.mark.parametrize(
    ("failing_rank", "limit_bytes", "changes", "width", "file"),
    [
        (0, 500, {}, 7, "__0_0.distcp"),
        (1, 500, {}, 7, "__1_0.distcp"),
        (1, 0, {}, 7, "__1_0.distcp"),
        (1, 100_000, {}, 20_000, "__1_0.distcp"),
        (0, 60_000, {"train_state": {"note": "x" * 100_000}}, 7, "MANIFEST.json"),
    ],
    ids=["rank 0", "rank 1", "first byte", "inside a large tensor", "manifest"],
)
def test_every_rank_fails_and_older_ones_stay(
    tmp_path: Path,
    failing_rank: int,
    limit_bytes: int,
    changes: dict[str, Any],
    width: int,
    file: str,
) -> None:
    outcomes = run_ranks(_fail_then_go_on, 2, tmp_path, failing_rank, limit_bytes, changes, width)
    assert outcomes[0][0] == outcomes[1][0]
    for message, after_failure, bad in outcomes:
        assert "\n" not in message
        assert f"rank {failing_rank}: " in message
        assert "File too large" in message
        if file != "MANIFEST.json":
            assert file in message
        assert after_failure == NAMES_AFTER_FAILURE
        assert bad == []
    assert _names(tmp_path) == ["step-00000002", "step-00000003"]


def _save_through_refusals(run_dir: Path, asynchronous: bool) -> tuple[list[str], list[str]]:
    """Two refusals, a success, two refusals, a required save, which is refused for good."""
    store = CheckpointStore(run_dir / "checkpoints", keep_last=2)
    metrics = MetricsWriter(run_dir, enabled=dist.get_rank() == 0)
    config = CheckpointConfig(retry_seconds=0.0, asynchronous=asynchronous)
    saver = Saver(store, metrics, run_dir, config, lambda: None)
    mesh = make_mesh()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = []
    for step, full, required in (
        (1, True, False),
        (2, True, False),
        (3, False, False),
        (4, True, False),
        (5, True, True),
        (6, False, False),
        (7, True, False),
        (8, True, False),
        (9, True, False),
    ):
        if full and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        try:
            saver.save(shard(plain_state(step), mesh), record(step), required)
            while store.under_way:
                saver.report()
            told.append("")
        except StorageError as error:
            told.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    metrics.close()
    store.close()
    return told, _names(run_dir / "checkpoints")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_third_refusal_in_a_row_and_a_refused_required_save_end_the_run(
    tmp_path: Path, asynchronous: bool
) -> None:
    (told, kept), other = run_ranks(_save_through_refusals, 2, tmp_path, asynchronous)
    assert other == (told, kept)
    assert [bool(text) for text in told] == [step in (5, 9) for step in range(1, 10)]
    assert "step 5: 4 saves in a row failed" in told[4] and "rank 1: " in told[4]
    assert "step 9: 3 saves in a row failed" in told[8] and "File too large" in told[8]
    assert kept == ["step-00000003", "step-00000006"]
    rows = list(iter_rows(tmp_path / METRICS_FILE))
    assert [(row["step"], row["in_a_row"]) for row in rows if row["kind"] == "save_failed"] == [
        *((1, 1), (2, 2), (4, 1), (5, 2), (5, 3), (5, 4), (7, 1), (8, 2), (9, 3))
    ]
    assert [row["step"] for row in rows if row["kind"] == "checkpoint"] == [3, 6]


def _required_save_of_a_disk_that_recovers(run_dir: Path) -> list[str]:
    store = CheckpointStore(run_dir / "checkpoints", keep_last=2)
    metrics = MetricsWriter(run_dir, enabled=dist.get_rank() == 0)
    state = shard(plain_state(1), make_mesh())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))

    def recover(_: float) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zaya_train.train.saving.time.sleep", recover)
        config = CheckpointConfig(retry_seconds=0.0)
        saver = Saver(store, metrics, run_dir, config, lambda: None)
        saver.save(state, record(1), required=True)
    return _names(run_dir / "checkpoints")


def test_a_required_save_is_tried_again(tmp_path: Path) -> None:
    for kept in run_ranks(_required_save_of_a_disk_that_recovers, 2, tmp_path):
        assert kept == ["step-00000001"]


def _ledger_refused(run_dir: Path, asynchronous: bool) -> list[str]:
    """What a checkpoint counts on cannot be flushed on rank 0: no rank saves, none is alone."""
    store = CheckpointStore(run_dir / "checkpoints", keep_last=2)
    metrics = MetricsWriter(run_dir, enabled=dist.get_rank() == 0)
    config = CheckpointConfig(retry_seconds=0.0, asynchronous=asynchronous)
    full = [True]

    def sync() -> None:
        assert dist.get_rank() == 0
        if full[0]:
            raise StorageError("ledger.jsonl: cannot be written")

    saver = Saver(store, metrics, run_dir, config, sync)
    for step in (1, 2, 3):
        full[0] = step < 3
        saver.save(shard(plain_state(step), make_mesh()), record(step), required=False)
    saver.settle()
    metrics.close()
    return _names(run_dir / "checkpoints")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_checkpoint_without_its_ledger(tmp_path: Path, asynchronous: bool) -> None:
    assert run_ranks(_ledger_refused, 2, tmp_path, asynchronous) == [["step-00000003"]] * 2
    rows = list(iter_rows(tmp_path / METRICS_FILE))
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("save_failed", 1),
        ("save_failed", 2),
        ("checkpoint", 3),
    ]
    assert rows[0]["reason"] == "ledger.jsonl: cannot be written"


def _corrupt_after_publishing(root: Path) -> tuple[str, int]:
    store = CheckpointStore(root, keep_last=2)
    mesh = make_mesh()
    for step in (1, 2):
        store.save(shard(plain_state(step), mesh), record(step))
    real_publish = storage.publish

    def publish(partial: Path, target: Path) -> None:
        real_publish(partial, target)
        path = target / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    storage.publish = publish
    try:
        store.save(shard(plain_state(3), mesh), record(3))
    except StorageError as error:
        found = store.newest()
        return str(error), found.record.step if found else -1
    raise AssertionError("a checkpoint that reads back differently was accepted")


def test_a_disk_that_lies_costs_no_older_checkpoint(tmp_path: Path) -> None:
    for message, newest in run_ranks(_corrupt_after_publishing, 2, tmp_path):
        assert "reads back differently from what was written: __1_0.distcp: sha256" in message
        assert newest == 2
    assert _names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003.bad"]
