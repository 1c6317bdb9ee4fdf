"""A background save holds the state of its step boundary, whatever training does meanwhile."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.faults.states import MODEL, blank, differing, make_mesh, plain_state, record, shard
from tests.faults.test_guarded_run import CHANGES, Spoiled, in_steps
from tests.helpers.distributed import PATIENCE_SECONDS, run_ranks
from tests.integration.runs import Launched, overrides_for, values_for
from zaya_train.config.errors import CheckpointError, LostRankError, NumericsError
from zaya_train.config.schema import CheckpointConfig
from zaya_train.tools.compare import compare_runs
from zaya_train.train import dcp
from zaya_train.train.checkpoint import CheckpointStore, Saved
from zaya_train.train.manifest import MANIFEST_NAME
from zaya_train.train.metrics import METRICS_FILE, MetricsWriter, iter_rows, read_metrics
from zaya_train.train.restore import load_full
from zaya_train.train.saving import Saver
from zaya_train.train.staging import HostCopies
from zaya_train.train.storage import LOCK_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

CONFIG = CheckpointConfig(retry_seconds=0.0)


class Gate:
    """Holds the writing thread of this rank before its first byte until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._opened = threading.Event()
        self.entered = threading.Event()
        real_write = dcp.write

        def write(*arguments: Any) -> Any:
            self.entered.set()
            assert self._opened.wait(PATIENCE_SECONDS)
            return real_write(*arguments)

        monkeypatch.setattr(dcp, "write", write)

    def open(self) -> None:
        self._opened.set()


def change(state: Mapping[str, Tensor]) -> None:
    """What an optimizer step does: other values in the same memory."""
    with torch.no_grad():
        for value in state.values():
            local = value.to_local() if isinstance(value, DTensor) else value
            local.fill_(7)


def _change_while_saving(root: Path) -> list[str]:
    store = CheckpointStore(root, keep_last=2)
    state = shard(plain_state(1), make_mesh())
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        store.start(state, record(1))
        assert gate.entered.wait(PATIENCE_SECONDS)
        change(state)
        gate.open()
        saved = store.finish()
    files = [p for p in saved.path.iterdir() if p.name != MANIFEST_NAME]
    assert saved.size_bytes == sum(p.stat().st_size for p in files)
    return differing(load_full(saved.path), plain_state(1))


def test_changes_after_start_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(_change_while_saving, 2, tmp_path) == [[], []]


def _train_while_saving(root: Path) -> list[str]:
    """Collectives of training go on in their own group while the save's are under way."""
    store = CheckpointStore(root, keep_last=2)
    mesh = make_mesh()
    bad = []
    for step in range(1, 5):
        state = shard(plain_state(step), mesh)
        store.start(state, record(step))
        rounds, everywhere = 0, False
        while not everywhere or rounds < 20:
            total = torch.full((3,), float(dist.get_rank() + rounds))
            dist.all_reduce(total)
            assert total.tolist() == [1.0 + 2 * rounds] * 3
            rounds += 1
            done = torch.tensor([store.finished], dtype=torch.int64)
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            everywhere = bool(done.item())
        saved = store.finish()
        bad += differing(load_full(saved.path), plain_state(step))
    return bad + sorted(path.name for path in root.glob("step-*"))


def test_training_collectives_do_not_mix_with_those_of_the_save(tmp_path: Path) -> None:
    expected = ["step-00000003", "step-00000004"]
    assert run_ranks(_train_while_saving, 2, tmp_path) == [expected] * 2


def _both_ways(root: Path) -> None:
    mesh = make_mesh(2)
    for name in ("waited", "background"):
        store = CheckpointStore(root / name, keep_last=2)
        state = shard(plain_state(1), mesh)
        if name == "waited":
            store.save(state, record(1))
        else:
            store.reserve(state)
            store.start(state, record(1))
            store.finish()
        store.close()


def test_both_ways_give_the_same_files(tmp_path: Path) -> None:
    run_ranks(_both_ways, 4, tmp_path)
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / name / "step-00000001").iterdir()}
        for name in ("waited", "background")
    ]
    assert files[0] == files[1]


def _use_while_saving(root: Path) -> list[str]:
    store = CheckpointStore(root, keep_last=2)
    state = shard(plain_state(1), make_mesh())
    store.save(state, record(1))
    found = store.newest()
    assert found is not None
    refused = []
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        store.start(state, record(2))
        uses: dict[str, Callable[[], object]] = {
            "save": lambda: store.save(state, record(3)),
            "start": lambda: store.start(state, record(3)),
            "reserve": lambda: store.reserve(state),
            "newest": store.newest,
            "verify": lambda: store.verify(found.path),
            "load": lambda: store.load(found, blank(plain_state(1), make_mesh()), MODEL),
        }
        for name, use in uses.items():
            try:
                use()
            except RuntimeError as error:
                assert "a save is under way; call finish first" in str(error)
                refused.append(name)
        gate.open()
        store.finish()
    with pytest.raises(RuntimeError, match="no save is under way"):
        store.finish()
    return refused


def test_the_store_has_one_user_at_a_time(tmp_path: Path) -> None:
    names = ["save", "start", "reserve", "newest", "verify", "load"]
    assert run_ranks(_use_while_saving, 2, tmp_path) == [names] * 2


def _poisoned(root: Path) -> tuple[str, bool]:
    store = CheckpointStore(root, keep_last=2)
    state = shard(plain_state(1), make_mesh())
    if dist.get_rank() == 1:
        momentum = state["optim.muon.model.layers.0.attn.weight.momentum"]
        assert isinstance(momentum, DTensor)
        momentum.to_local()[0, 0] = float("-inf")
    with pytest.raises(NumericsError) as caught:
        store.start(state, record(1))
    return str(caught.value), store.under_way


def test_only_finite_tensors_reach_the_background(tmp_path: Path) -> None:
    for message, under_way in run_ranks(_poisoned, 2, tmp_path):
        assert "momentum on rank 1 is not finite (1 shards" in message
        assert not under_way
    assert list(tmp_path.glob("step-*")) == []


def make_saver(run_dir: Path) -> tuple[CheckpointStore, MetricsWriter, Saver]:
    store = CheckpointStore(run_dir / "checkpoints", keep_last=2)
    metrics = MetricsWriter(run_dir, enabled=dist.get_rank() == 0)
    return store, metrics, Saver(store, metrics, run_dir, CONFIG, lambda: None)


def _wait_at_the_next_save(run_dir: Path) -> tuple[list[str], bool]:
    store, metrics, saver = make_saver(run_dir)
    state = shard(plain_state(1), make_mesh())
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        saver.save(state, record(1), required=False)
        assert gate.entered.wait(PATIENCE_SECONDS)
        saver.report()
        still = store.under_way
        real_finish = store.finish

        def finish() -> Saved:
            # From inside the wait, so that what the machine does meanwhile can only lengthen it.
            time.sleep(0.3)
            gate.open()
            return real_finish()

        patch.setattr(store, "finish", finish)
        change(state)
        saver.save(state, record(2), required=False)
        saver.save(state, record(3), required=True)
        assert not store.under_way
    metrics.close()
    loaded = load_full(run_dir / "checkpoints" / "step-00000003")
    return sorted(k for k, v in loaded.items() if not (v == 7).all()), still


def test_a_save_waits_for_the_one_before_and_a_required_one_for_itself(tmp_path: Path) -> None:
    assert run_ranks(_wait_at_the_next_save, 2, tmp_path) == [([], True)] * 2
    rows = [row for row in iter_rows(tmp_path / METRICS_FILE) if row["kind"] == "checkpoint"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["blocked_seconds"] >= 0.3, "the wait for the first is not counted"
    assert rows[2]["blocked_seconds"] >= rows[2]["seconds"]
    assert all(row["bytes"] > 0 for row in rows)


def _leave(run_dir: Path, error: BaseException | None) -> bool:
    """Leave the saver's context with a save under way; whether it was waited for."""
    store, metrics, saver = make_saver(run_dir)
    state = shard(plain_state(1), make_mesh())
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        with suppress(type(error)) if error else nullcontext(), saver:
            saver.save(state, record(1), required=False)
            assert gate.entered.wait(PATIENCE_SECONDS)
            threading.Timer(0.2, gate.open).start()
            if error:
                raise error
        waited = not store.under_way
        gate.open()
        if store.under_way:
            store.finish()
    metrics.close()
    return waited


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (None, True),
        (NumericsError("five steps in a row"), True),
        (ValueError("a bug"), True),
        (LostRankError("rank 1"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=["end", "agreed", "bug", "lost rank", "keyboard"],
)
def test_leaving_finishes_the_save_under_way(
    tmp_path: Path, error: BaseException | None, waits: bool
) -> None:
    assert run_ranks(_leave, 2, tmp_path, error) == [waits] * 2
    told = [row["kind"] for row in iter_rows(tmp_path / METRICS_FILE)]
    assert told == (["checkpoint"] if waits else [])


TAKE_LOCK = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(1)
"""


def _lock_is_free(store: CheckpointStore) -> bool:
    """Whether another process could write here."""
    command = [sys.executable, "-I", "-c", TAKE_LOCK, str(store.root / LOCK_NAME)]
    return subprocess.run(command, check=False).returncode == 0


def _interrupted(root: Path) -> list[bool]:
    store = CheckpointStore(root, keep_last=2)
    free = []
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        store.start(plain_state(1), record(1))
        assert gate.entered.wait(PATIENCE_SECONDS)
        store.close()
        free.append(_lock_is_free(store))
        gate.open()
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint"):
                thread.join(PATIENCE_SECONDS)
        free.append(_lock_is_free(store))
    return free


def test_a_save_under_way_keeps_the_lock_of_a_closed_store(tmp_path: Path) -> None:
    """As after a second Ctrl-C: a restart would delete the directory being written."""
    assert run_ranks(_interrupted, 1, tmp_path) == [[False, True]]
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def _another_state_at_the_same_step(run_dir: Path) -> tuple[bool, str]:
    store, metrics, saver = make_saver(run_dir)
    mesh = make_mesh()
    store.save(shard(plain_state(5), mesh), record(2))
    saver.save(shard(plain_state(6), mesh), record(2), required=False)
    while store.under_way:
        saver.report()
    try:
        saver.save(shard(plain_state(7), mesh), record(3), required=False)
    except CheckpointError as error:
        return store.under_way, str(error)
    finally:
        metrics.close()
    raise AssertionError("a save that can never succeed was forgotten")


def test_what_ends_the_run_is_raised_by_all_ranks_at_the_next_save(tmp_path: Path) -> None:
    for under_way, message in run_ranks(_another_state_at_the_same_step, 2, tmp_path):
        assert "holds other values than this run has at that step" in message
        assert not under_way
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000002"]


def test_a_run_that_waits_for_its_saves_is_the_same(
    corpora: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise; and the loop asks for the outcome of a background save after every step."""
    real_report = Saver.report

    def report(saver: Saver) -> None:
        with (tmp_path / "reports").open("a") as stream:
            stream.write("x")
        real_report(saver)

    monkeypatch.setattr(Saver, "report", report)
    words = overrides_for(values_for(tmp_path / "run", corpora))
    waiting = Launched([*words, "checkpoint.asynchronous=false"], tmp_path / "out", ranks=2)
    assert waiting.wait() == [0, 0], waiting.output()
    comparison = compare_runs(tmp_path / "run", unbroken)
    assert comparison.equal and comparison.steps == 13, comparison.text()
    assert len((tmp_path / "reports").read_text()) == 13 * 2
    saves = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "checkpoint"]
    assert [row["step"] for row in saves] == [3, 6, 8, 9, 12, 13]
    assert all(row["blocked_seconds"] >= row["seconds"] for row in saves)


def test_a_roll_back_waits_for_the_save_under_way(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Background saves write nothing until somebody waits for them: that of step 3 is under way
    when the guard asks for the newest checkpoint after step 6."""
    waited_for = threading.Event()
    real_write, real_finish = dcp.write, CheckpointStore.finish

    def write(*arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert waited_for.wait(PATIENCE_SECONDS)
            waited_for.clear()
        return real_write(*arguments)

    def finish(store: CheckpointStore) -> Saved:
        waited_for.set()
        return real_finish(store)

    monkeypatch.setattr(dcp, "write", write)
    monkeypatch.setattr(CheckpointStore, "finish", finish)
    changes = {
        **CHANGES,
        "guard.most_skipped": 2,
        "guard.at_limit": "roll_back",
        "checkpoint.every_steps": 3,
    }
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        Spoiled(patch, in_steps({5: math.nan, 6: math.nan}))
        words = overrides_for(values_for(run_dir, corpora, changes))
        launched = Launched(words, tmp_path / "out", ranks=2)
        assert launched.wait() == [0, 0], launched.output()
    (resume,) = (row for row in read_metrics(run_dir) if row["kind"] == "resume")
    assert resume["step"] == 3


def test_host_copies_are_reused_and_follow_the_shapes() -> None:
    copies = HostCopies()
    first = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int64)}
    taken = copies.take(first)
    places = {key: value.data_ptr() for key, value in taken.items()}
    first["a"].fill_(5)
    assert taken["a"].tolist() == [0, 1, 2, 3, 4, 5]
    again = copies.take(first)
    assert {key: value.data_ptr() for key, value in again.items()} == places
    assert again["a"].tolist() == [5] * 6
    other = copies.take({"a": torch.ones(2, 3), "c": torch.zeros(0)})
    assert other.keys() == {"a", "c"}
    assert other["a"].tolist() == [[1, 1, 1]] * 2


def _devices_of_the_thread(root: Path, device: str) -> list[tuple[str, torch.device]]:
    """Where a thread chose which accelerator, in a save of a rank with `device`."""
    chosen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.accelerator,
            "set_device_index",
            lambda choice: chosen.append((threading.current_thread().name, choice)),
        )
        store = CheckpointStore(root, keep_last=2, device=torch.device(device))
        store.start(plain_state(1), record(1))
        store.finish()
        store.close()
    return chosen


def test_the_writing_thread_works_on_the_rank_s_own_device(tmp_path: Path) -> None:
    """Pinned memory and copies made by a thread that chose none would use the first one."""
    chosen = [("checkpoint_0", torch.device("cuda:3"))]
    assert run_ranks(_devices_of_the_thread, 1, tmp_path / "cuda", "cuda:3") == [chosen]
    assert run_ranks(_devices_of_the_thread, 1, tmp_path / "cpu", "cpu") == [[]]


def test_no_thread_survives_a_closed_store(tmp_path: Path) -> None:
    def saved_then_closed(root: Path) -> list[str]:
        store = CheckpointStore(root, keep_last=2)
        store.start(plain_state(1), record(1))
        store.finish()
        store.close()
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint"):
                thread.join(PATIENCE_SECONDS)
        return [t.name for t in threading.enumerate() if t.name.startswith("checkpoint")]

    assert run_ranks(saved_then_closed, 1, tmp_path) == [[]]
