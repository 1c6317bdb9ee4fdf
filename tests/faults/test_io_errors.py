"""The device fails (EIO) while a save is written, confirmed or looked for at a resume.

strace makes the kernel answer a system call of one rank with EIO, for the files that are named:
real errors where real ones would come, in C code as in Python. Where strace is not installed or may
not trace, the tests skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from tests.faults.states import MODEL, blank, differing, make_mesh, plain_state, record, shard
from tests.helpers.distributed import run_ranks
from zaya_train.config.errors import CheckpointError
from zaya_train.config.schema import CheckpointConfig
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.metrics import METRICS_FILE, MetricsWriter, iter_rows
from zaya_train.train.restore import load_full, verify
from zaya_train.train.saving import Saver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

STRACE = shutil.which("strace")


def why_not() -> str:
    """What keeps strace from working here; empty if nothing does."""
    if STRACE is None:
        return "no strace: apt-get install strace"
    words = [STRACE, "-o", os.devnull, "-e", "inject=fsync:error=EIO", "-p"]
    # cat ends with its input, and strace with it.
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe, stdout=pipe) as traced:
        tracer = subprocess.Popen([*words, str(traced.pid)], stderr=pipe, text=True)
        assert tracer.stderr is not None
        told = tracer.stderr.readline()
        traced.communicate()
        tracer.communicate()
    return "" if "attached" in told else told.strip() or "strace says nothing"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@contextmanager
def device_errors(calls: str, paths: Sequence[Path], log: Path) -> Iterator[None]:
    """System calls `calls` of this process on `paths`, in all its threads, fail with EIO.

    A rank calls it for itself. AssertionError if nothing failed inside.
    """
    assert STRACE is not None
    words = [STRACE, "-f", "-o", str(log), "-e", f"trace={calls}"]
    words += ["-e", f"inject={calls}:error=EIO", "-p", str(os.getpid())]
    words += [word for path in paths for word in ("-P", str(path))]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        told = tracer.stderr.readline()
        assert "attached" in told, told
        try:
            yield
        finally:
            # It lets go of the process and ends.
            tracer.terminate()
    assert "(INJECTED)" in log.read_text(), f"{calls} of {paths}: none was made"


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step-*"))


def _save_over_errors(
    root: Path, run_dir: Path, failing: tuple[int, str, str]
) -> tuple[list[str], list[str]]:
    """Save, fail, save; names after the failure, and what differs from what was meant."""
    rank, calls, name = failing
    store = CheckpointStore(root, keep_last=2)
    metrics = MetricsWriter(run_dir, enabled=dist.get_rank() == 0)
    config = CheckpointConfig(retry_seconds=0.0)
    saver = Saver(store, metrics, run_dir, config, lambda: None)
    mesh, bad, left = make_mesh(), [], []
    for step in (1, 2, 3):
        state = shard(plain_state(step), mesh)
        if step == 2 and dist.get_rank() == rank:
            with device_errors(calls, [root / name], run_dir / "strace"):
                saver.save(state, record(step), required=False)
                saver.settle()
        else:
            saver.save(state, record(step), required=False)
            saver.settle()
        dist.barrier()
        if step == 2:
            left = _names(root)
            bad += verify(root / "step-00000001")
            bad += differing(load_full(root / "step-00000001"), plain_state(1))
        dist.barrier()
    found = store.newest()
    assert found is not None and found.record.step == 3
    bad += differing(load_full(found.path), plain_state(3))
    metrics.close()
    store.close()
    return left, bad


@pytest.mark.parametrize(
    ("failing", "left"),
    [
        ((1, "write", "step-00000002.tmp/__1_0.distcp"), ["step-00000001"]),
        ((1, "fsync", "step-00000002.tmp/__1_0.distcp"), ["step-00000001"]),
        ((0, "fsync", "step-00000002.tmp/.metadata.tmp"), ["step-00000001"]),
        ((0, "rename,?renameat,?renameat2", "step-00000002.tmp"), ["step-00000001"]),
        # Whole under its name, only that the name would survive a loss of power is not known.
        ((0, "fsync", ""), ["step-00000001", "step-00000002"]),
        # Written well, and cannot be read back: nothing to rely on.
        ((0, "read", "step-00000002/__1_0.distcp"), ["step-00000001", "step-00000002.bad"]),
    ],
    ids=["write", "flush", "flush of metadata", "rename", "flush of the name", "reading back"],
)
def test_a_device_error_costs_one_checkpoint(
    tmp_path: Path, failing: tuple[int, str, str], left: list[str]
) -> None:
    outcomes = run_ranks(_save_over_errors, 2, tmp_path / "checkpoints", tmp_path, failing)
    assert outcomes == [(left, [])] * 2
    rows = list(iter_rows(tmp_path / METRICS_FILE))
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("checkpoint", 1),
        ("save_failed", 2),
        ("checkpoint", 3),
    ]
    assert "Input/output error" in rows[1]["reason"]


def _resume_over_errors(root: Path, log: Path, rank: int, names: Sequence[str]) -> str:
    """What a resume begins with, or why there is none."""
    store = CheckpointStore(root, keep_last=2)
    for step in (1, 2):
        store.save(shard(plain_state(step), make_mesh()), record(step))
    try:
        if dist.get_rank() == rank:
            with device_errors("read", [root / name for name in names], log):
                found = store.newest()
        else:
            found = store.newest()
    except CheckpointError as error:
        return str(error)
    finally:
        store.close()
    assert found is not None
    step = found.record.step
    return f"step {step}: {differing(load_full(found.path), plain_state(step))}"


@pytest.mark.parametrize(
    ("rank", "name"), [(0, "MANIFEST.json"), (1, ".metadata"), (1, "__0_0.distcp")]
)
def test_an_unreadable_checkpoint_is_passed_over(tmp_path: Path, rank: int, name: str) -> None:
    """As every rank decides alike, it is enough that one cannot read."""
    names = [f"step-00000002/{name}"]
    told = run_ranks(_resume_over_errors, 2, tmp_path / "root", tmp_path / "log", rank, names)
    assert told == ["step 1: []"] * 2


def test_no_readable_checkpoint_is_no_start_from_zero(tmp_path: Path) -> None:
    names = [f"step-0000000{step}/__0_0.distcp" for step in (1, 2)]
    told = run_ranks(_resume_over_errors, 2, tmp_path / "root", tmp_path / "log", 1, names)
    assert told[0] == told[1]
    assert "no usable checkpoint" in told[0] and told[0].count("Input/output error") == 2


def _load_over_errors(root: Path, log: Path) -> str:
    store = CheckpointStore(root, keep_last=2)
    state, mesh = plain_state(1), make_mesh()
    store.save(shard(state, mesh), record(1))
    found = store.newest()
    assert found is not None
    target = blank(state, mesh)
    files = [found.path / "__1_0.distcp"]
    try:
        if dist.get_rank() == 1:
            with device_errors("read,pread64", files, log):
                store.load(found, target, MODEL)
        else:
            store.load(found, target, MODEL)
    except CheckpointError as error:
        return str(error)
    finally:
        store.close()
    return "loaded"


def test_a_device_error_while_loading_is_told_by_all(tmp_path: Path) -> None:
    first, second = run_ranks(_load_over_errors, 2, tmp_path / "root", tmp_path / "log")
    assert first == second
    assert "rank 1: " in first and "Input/output error" in first
