"""A file system that is really full, or really read-only, while a save is written.

A small tmpfs is mounted for each test; where that is not permitted the tests skip, and
test_full_disk.py still has the kernel refuse writes by RLIMIT_FSIZE.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from tests.faults.states import differing, make_mesh, plain_state, record, shard
from tests.helpers.distributed import run_ranks
from zaya_train.config.errors import StorageError
from zaya_train.config.schema import CheckpointConfig
from zaya_train.data.ledger import LedgerWriter, PhaseEntry, StepEntry, read_ledger
from zaya_train.runtime.files import INCIDENTS_FILE
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.guard import Incidents
from zaya_train.train.metrics import METRICS_FILE, MetricsWriter, iter_rows
from zaya_train.train.restore import load_full, verify
from zaya_train.train.saving import Saver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE_BYTES = 4_000_000
WIDTH = 8_000
"""About 0.8 MB of state: four checkpoints of it fill the file system."""
ROWS = 100
"""Ledger rows between saves: more than fits into what is left of the last block."""


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of SIZE_BYTES."""
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    place = tmp_path / "small"
    place.mkdir()
    mount("-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(place))
    try:
        yield place
    finally:
        # A test may have mounted over it.
        while subprocess.run(["umount", "-l", str(place)], check=False).returncode == 0:
            continue


def steps_while_saving(store: CheckpointStore) -> int:
    """Collectives of training until every rank's save has ended."""
    rounds, ended = 0, False
    while not ended:
        flags = torch.tensor([int(store.finished), 1])
        dist.all_reduce(flags)
        rounds += 1
        assert flags[1] == dist.get_world_size()
        ended = bool(flags[0] == dist.get_world_size())
    return rounds


def _fill_and_free(root: Path, run_dir: Path) -> tuple[list[str], list[str]]:
    """Save, fill the file system, fail, free it, save; what failed and what differs."""
    store = CheckpointStore(root, keep_last=2)
    metrics = MetricsWriter(run_dir, enabled=dist.get_rank() == 0)
    saver = Saver(store, metrics, root, CheckpointConfig(retry_seconds=0.0), lambda: None)
    mesh, bad = make_mesh(), []
    filler = root.parent / "filler"
    for step in (1, 2, 3):
        if dist.get_rank() == 0 and step == 2:
            free = shutil.disk_usage(root).free
            filler.write_bytes(bytes(free - 200_000))
        elif dist.get_rank() == 0:
            filler.unlink(missing_ok=True)
        dist.barrier()
        saver.save(shard(plain_state(step, width=WIDTH), mesh), record(step), required=False)
        steps_while_saving(store)
        saver.report()
        assert not store.under_way
        if step == 2:
            bad += verify(root / "step-00000001")
            bad += differing(load_full(root / "step-00000001"), plain_state(1, width=WIDTH))
    found = store.newest()
    assert found is not None and found.record.step == 3
    bad += differing(load_full(found.path), plain_state(3, width=WIDTH))
    metrics.close()
    store.close()
    return bad, sorted(path.name for path in root.glob("step-*"))


def test_a_full_file_system_costs_one_checkpoint(small: Path, tmp_path: Path) -> None:
    names = ["step-00000001", "step-00000003"]
    assert run_ranks(_fill_and_free, 2, small / "checkpoints", tmp_path) == [([], names)] * 2
    rows = list(iter_rows(tmp_path / METRICS_FILE))
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("checkpoint", 1),
        ("save_failed", 2),
        ("checkpoint", 3),
    ]
    assert "No space left on device" in rows[1]["reason"]


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _all_records_on_it(run_dir: Path) -> list[str]:
    """Records of rank 0 and checkpoints on one file system, which is full during step 2."""
    main = dist.get_rank() == 0
    metrics = MetricsWriter(run_dir, enabled=main)
    ledger, incidents = LedgerWriter(run_dir, main), Incidents(run_dir, 1, main)
    store = CheckpointStore(run_dir / "checkpoints", keep_last=2)
    config = CheckpointConfig(retry_seconds=0.0)
    saver = Saver(store, metrics, run_dir, config, ledger.sync)
    ledger.phase(PhaseEntry("short", 0, {}), 0)
    mesh, filler = make_mesh(), run_dir / "filler"
    for step in (1, 2, 3):
        if main and step == 2:
            _fill(filler)
        elif main:
            filler.unlink(missing_ok=True)
        dist.barrier()
        for row in range(ROWS):
            ledger.step(step * ROWS + row, (step - 1) * ROWS + row + 1, row)
        metrics.write("done", step=step, note="x" * 5000)
        incidents.write(kind="test", step=step, note="x" * 5000)
        saver.save(shard(plain_state(step), mesh), record(step), required=False)
        if store.under_way:
            steps_while_saving(store)
        saver.report()
    metrics.close()
    ledger.close()
    incidents.close()
    return sorted(path.name for path in store.root.glob("step-*"))


def test_a_full_file_system_costs_no_line_of_the_records(small: Path) -> None:
    run_dir = small / "run"
    names = ["step-00000001", "step-00000003"]
    assert run_ranks(_all_records_on_it, 2, run_dir) == [names] * 2
    rows = list(iter_rows(run_dir / METRICS_FILE))
    assert [row["step"] for row in rows if row["kind"] == "done"] == [1, 2, 3]
    saves = [(row["kind"], row["step"]) for row in rows if row["kind"] != "done"]
    assert saves == [("checkpoint", 1), ("save_failed", 2), ("checkpoint", 3)]
    entries = [entry for entry in read_ledger(run_dir) if isinstance(entry, StepEntry)]
    assert [entry.first for entry in entries] == list(range(3 * ROWS))
    lines = (run_dir / INCIDENTS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def _read_only_meanwhile(root: Path) -> tuple[str, str, int]:
    """The file system turns read-only before a save, and is writable again after it."""
    store = CheckpointStore(root, keep_last=2)
    mesh = make_mesh()
    store.save(shard(plain_state(1), mesh), record(1))
    _remount(root.parent, "ro")
    store.start(shard(plain_state(2), mesh), record(2))
    steps_while_saving(store)
    try:
        store.finish()
        message = "saved"
    except StorageError as error:
        message = str(error)
    _remount(root.parent, "rw")
    left = ",".join(sorted(path.name for path in root.glob("step-*")))
    store.start(shard(plain_state(3), mesh), record(3))
    store.finish()
    found = store.newest()
    store.close()
    return message, left, found.record.step if found else -1


def _remount(place: Path, mode: str) -> None:
    """On rank 0, seen by all. The writer's lock is an open file, which forbids a read-only
    remount; a read-only bind mount over the place does not mind."""
    if dist.get_rank() == 0:
        if mode == "ro":
            subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        else:
            subprocess.run(["umount", str(place)], check=True)
    dist.barrier()


def test_a_read_only_file_system_is_told_by_all(small: Path) -> None:
    for message, left, newest in run_ranks(_read_only_meanwhile, 2, small / "checkpoints"):
        assert "Read-only file system" in message
        assert left == "step-00000001"
        assert newest == 3


def _too_large(root: Path) -> str:
    store = CheckpointStore(root, keep_last=2)
    store.start(shard(plain_state(1, width=100_000), make_mesh()), record(1))
    try:
        store.finish()
    except StorageError as error:
        return str(error)
    return "saved"


def test_a_state_larger_than_the_file_system_leaves_nothing(small: Path) -> None:
    first, second = run_ranks(_too_large, 2, small / "checkpoints")
    assert first == second
    assert "No space left on device" in first
    assert list((small / "checkpoints").glob("step-*")) == []
