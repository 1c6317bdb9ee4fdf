"""Training end to end: killed, stopped, corrupted, out of disk, and always the same numbers."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from tests.integration.runs import Launched, make_corpora, overrides_for, values_for
from zaya_train.data.corpus import read_manifest
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.hub.convert import from_hf
from zaya_train.main import main
from zaya_train.run import CHECKPOINTS
from zaya_train.runtime.heartbeat import Heartbeat
from zaya_train.tools.compare import compare_runs
from zaya_train.train.identity import read_attempts
from zaya_train.train.manifest import read
from zaya_train.train.metrics import read_metrics
from zaya_train.train.restore import find_newest, load_full, verify
from zaya_train.train.saving import Saver

if TYPE_CHECKING:
    from collections.abc import Iterator

ONE_RANK = {"parallel.context_parallel_limit": 1}
TOTAL_STEPS = 13
"""Eight of the first phase, five of the second."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpus"))


def overrides(run_dir: Path, corpora: Path, changes: dict[str, Any] | None = None) -> list[str]:
    return overrides_for(values_for(run_dir, corpora, changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """A run of one rank that ended as planned."""
    folder = tmp_path_factory.mktemp("finished")
    launched = Launched(overrides(folder / "run", corpora, ONE_RANK), folder)
    assert launched.wait() == [0], launched.output()
    return folder / "run"


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_dir) if row["kind"] == "step"]


def newest_step(run_dir: Path) -> int:
    found, _ = find_newest(run_dir / CHECKPOINTS)
    assert found is not None
    return found.record.step


def test_a_finished_run_holds_what_it_should(finished: Path) -> None:
    rows = read_metrics(finished)
    kinds = [row["kind"] for row in rows]
    assert (kinds[0], kinds[-1]) == ("start", "done")
    steps = steps_of(finished)
    assert [row["step"] for row in steps] == list(range(1, TOTAL_STEPS + 1))
    assert [row["phase"] for row in steps] == ["short"] * 8 + ["long"] * 5
    assert steps[-1]["tokens"] == 8 * 4 * 64 + 5 * 2 * 128
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(row["flops"] > 0 and row["mfu_measured"] > 0 for row in steps)
    assert not any("mfu" in row for row in steps)
    assert "so no MFU by it" in (finished / "logs" / "rank-0.log").read_text()
    evals = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evals] == [4, 8, 12, 13]
    assert all(row["losses"]["problems"] > 0 for row in evals)
    kept = sorted(path.name for path in (finished / CHECKPOINTS).glob("step-*"))
    # The newest three and the end of each phase.
    assert kept == [f"step-{step:08d}" for step in (8, 9, 12, 13)]
    assert (finished / "tokenizer" / "tokenizer.json").is_file()


def test_learning_rates_follow_each_phases_schedule(finished: Path) -> None:
    rates = [row["muon_lr"] for row in steps_of(finished)]
    # Warm-up over one step of 256 tokens, decay over the last two of eight.
    assert rates[:8] == pytest.approx([0.02] * 6 + [0.01, 0.0], abs=1e-12)
    assert rates[8] < 0.02
    assert rates[12] == pytest.approx(0.0, abs=1e-12)


def test_running_a_finished_run_again_changes_nothing(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = _files(run_dir / CHECKPOINTS)
    launched = Launched(_again(finished, run_dir), tmp_path / "out")
    assert launched.wait() == [0], launched.output()
    assert _files(run_dir / CHECKPOINTS) == before
    assert compare_runs(run_dir, finished).equal


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.glob("step-*/*")}


def _again(finished: Path, run_dir: Path, changes: dict[str, Any] | None = None) -> list[str]:
    """Overrides of the finished run, for a copy of its directory."""
    corpora = Path(_config(finished)["data"]["sources"]["problems"]["path"]).parents[1]
    return overrides(run_dir, corpora, {**ONE_RANK, **(changes or {})})


def _config(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "config.json").read_text())
    return values


@contextmanager
def signalling_itself(number: signal.Signals, step: int, rank: int = 0) -> Iterator[None]:
    """Runs launched meanwhile: `rank` signals itself in the forward pass of `step`, so that no
    clock decides where it is hit."""
    mark = Heartbeat.mark

    def marked(heartbeat: Heartbeat, phase: str, now: int | None = None) -> None:
        mark(heartbeat, phase, now)
        if (phase, now) == ("forward", step) and os.environ.get("RANK", "0") == str(rank):
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heartbeat, "mark", marked)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """A run of two ranks whose second phase shares rows between them."""
    folder = tmp_path_factory.mktemp("unbroken")
    launched = Launched(overrides(folder / "run", corpora), folder, ranks=2)
    assert launched.wait() == [0, 0], launched.output()
    return folder / "run"


def test_killed_at_random_and_resumed_is_bitwise_the_same(
    unbroken: Path, corpora: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = overrides(run_dir, corpora)
    kills = [random.SystemRandom().randint(1, 8), random.SystemRandom().randint(9, 12)]
    for step in kills:
        launched = Launched(words, tmp_path / f"killed-{step}", ranks=2).at_step(run_dir, step)
        launched.kill()
        # The last steps may be over before the signal arrives.
        assert set(launched.wait()) <= {-signal.SIGKILL, 0}
    last = Launched(words, tmp_path / "last", ranks=2)
    assert last.wait() == [0, 0], last.output()
    comparison = compare_runs(run_dir, unbroken)
    assert comparison.equal, f"killed at {kills}: {comparison.text()}"
    assert comparison.steps == TOTAL_STEPS
    launches = [r["kind"] for r in read_metrics(run_dir) if r["kind"] in ("start", "resume")]
    assert len(launches) == 3


def test_two_ranks_train_as_one_does(unbroken: Path, finished: Path) -> None:
    for ours, alone in zip(steps_of(unbroken), steps_of(finished), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        # Attention's pairs and the like, whatever ranks they were split over.
        assert ours["flops"] == pytest.approx(alone["flops"], rel=1e-6)
    found, _ = find_newest(unbroken / CHECKPOINTS)
    assert found is not None
    assert found.record.mesh == {"replicate": 1, "shard": 1, "context": 2, "expert": 1}


def test_comparison_sees_a_single_bit(finished: Path, unbroken: Path) -> None:
    comparison = compare_runs(finished, unbroken)
    assert not comparison.equal
    assert compare_runs(finished, finished).equal


def test_sigterm_saves_and_asks_to_be_queued_again(
    finished: Path, corpora: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = overrides(run_dir, corpora, ONE_RANK)
    with signalling_itself(signal.SIGTERM, step=5):
        launched = Launched(words, tmp_path / "first")
    assert launched.wait() == [75], launched.output()
    stopped_at = newest_step(run_dir)
    assert stopped_at == steps_of(run_dir)[-1]["step"]

    # The queue starts it again on a disk that is full.
    full = Launched(words, tmp_path / "full", file_bytes=16_384)
    assert full.wait() == [4], full.output()
    assert "error:" in full.output()
    assert "saves in a row failed, stopped: " in full.output()
    assert "File too large" in full.output()
    failed = [row for row in read_metrics(run_dir) if row["kind"] == "save_failed"]
    assert failed[-1]["in_a_row"] == len(failed) >= 3
    assert all("File too large" in row["reason"] for row in failed)
    assert newest_step(run_dir) == stopped_at
    found, _ = find_newest(run_dir / CHECKPOINTS)
    assert found is not None
    assert verify(found.path) == []

    last = Launched(words, tmp_path / "last")
    assert last.wait() == [0], last.output()
    comparison = compare_runs(run_dir, finished)
    assert comparison.equal, comparison.text()


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(
    unbroken: Path, corpora: Path, tmp_path: Path
) -> None:
    """One rank's writes fail until the first alarm; the run ends with the numbers of any other."""
    run_dir = tmp_path / "run"
    words = overrides(run_dir, corpora)
    enter, alarm = Saver.__enter__, Saver._alarm

    def limited(size_bytes: int) -> None:
        if dist.get_rank() == 1:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))

    def full(saver: Saver) -> Saver:
        limited(16_384)
        return enter(saver)

    def freed(saver: Saver, *told: Any) -> None:
        alarm(saver, *told)
        limited(resource.RLIM_INFINITY)

    # In the ranks, by themselves: no clock decides how long the disk is full.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "__enter__", full)
        patch.setattr(Saver, "_alarm", freed)
        launched = Launched(words, tmp_path / "out", ranks=2)
    assert launched.wait() == [0, 0], launched.output()
    rows = read_metrics(run_dir)
    failed = next(row for row in rows if row["kind"] == "save_failed")
    assert (failed["step"], failed["in_a_row"]) == (3, 1)
    assert "rank 1: " in failed["reason"] and "File too large" in failed["reason"]
    saved = [row["step"] for row in rows if row["kind"] == "checkpoint"]
    assert 3 not in saved and saved[-4:] == [8, 9, 12, 13]
    comparison = compare_runs(run_dir, unbroken)
    assert comparison.equal, comparison.text()


def test_checkpoint_of_another_model_is_refused(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for step in (9, 12, 13):
        shutil.rmtree(run_dir / CHECKPOINTS / f"step-{step:08d}")
    words = _again(finished, run_dir, {"model.num_layers": 1, "model.norm_eps": 1e-6})
    launched = Launched(words, tmp_path / "out")
    assert launched.wait() == [2], launched.output()
    line = launched.output().splitlines()[-1]
    assert line.startswith("error:")
    assert "num_layers is 2 there, 1 here" in line
    assert "norm_eps is 1e-05 there, 1e-06 here" in line


def test_corrupt_newest_checkpoint_falls_back_and_says_so(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    newest = run_dir / CHECKPOINTS / f"step-{TOTAL_STEPS:08d}"
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    launched = Launched(_again(finished, run_dir), tmp_path / "out")
    assert launched.wait() == [0], launched.output()
    log = (run_dir / "logs" / "rank-0.log").read_text()
    assert f"skipping checkpoint step-{TOTAL_STEPS:08d}: {victim.name}" in log
    assert [row["step"] for row in read_metrics(run_dir) if row["kind"] == "resume"] == [12]
    comparison = compare_runs(run_dir, finished)
    assert comparison.equal, comparison.text()
    assert list((run_dir / CHECKPOINTS).glob("*.bad*"))


def test_a_corpus_that_changed_is_refused(finished: Path, tmp_path: Path) -> None:
    run_dir, corpora = tmp_path / "run", tmp_path / "corpora"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / CHECKPOINTS / f"step-{TOTAL_STEPS:08d}")
    original = Path(_config(finished)["data"]["sources"]["problems"]["path"]).parents[1]
    shutil.copytree(original, corpora)
    words = overrides(run_dir, corpora, ONE_RANK)
    source = corpora / "train.jsonl"
    source.write_text("".join(source.read_text().splitlines(keepends=True)[:-1]))
    request = PrepareRequest(input=str(source), output=corpora / "train", overwrite=True)
    prepare(request, Console(quiet=True))
    hashes = [read_manifest(c / "train" / "train").content_sha256 for c in (original, corpora)]
    launched = Launched(words, tmp_path / "out")
    assert launched.wait() == [2], launched.output()
    line = launched.output().splitlines()[-1]
    assert line.startswith("error: ") and "data.sources.problems" in line
    assert f"{hashes[0]} -> {hashes[1]}" in line
    assert "choose another run.dir" in line
    # The same content under another path goes on.
    moved = Launched(overrides(run_dir, original, ONE_RANK), tmp_path / "moved")
    assert moved.wait() == [0], moved.output()
    assert compare_runs(run_dir, finished).equal


def test_a_changed_configuration_is_told_and_both_are_kept(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = _config(run_dir)
    for step in (12, 13):
        shutil.rmtree(run_dir / CHECKPOINTS / f"step-{step:08d}")
    # What is refused leaves the record as it was.
    refused = Launched(_again(finished, run_dir, {"run.seed": 9}), tmp_path / "refused")
    assert refused.wait() == [2], refused.output()
    assert _config(run_dir) == before
    change = {"optim.muon.learning_rate": 0.01}
    unnamed = Launched(_again(finished, run_dir, change), tmp_path / "unnamed")
    assert unnamed.wait() == [2], unnamed.output()
    line = unnamed.output().splitlines()[-1]
    assert "optim.muon.learning_rate: 0.02 -> 0.01; restore them, or say so: " in line
    assert line.endswith("checkpoint.allow_changed=[optim.muon.learning_rate]")
    assert _config(run_dir) == before
    named = {**change, "checkpoint.allow_changed": ["optim.muon.learning_rate"]}
    words = _again(finished, run_dir, named)
    launched = Launched(words, tmp_path / "out")
    assert launched.wait() == [0], launched.output()
    (row,) = (row for row in read_metrics(run_dir) if row["kind"] == "resume")
    assert row["config_changes"] == {
        "optim.muon.learning_rate": [0.02, 0.01],
        "run.dir": [str(finished), str(run_dir)],
        "checkpoint.allow_changed": [[], ["optim.muon.learning_rate"]],
    }
    attempts = read_attempts(run_dir)
    assert [entry["step"] for entry in attempts] == [0, 9]
    assert attempts[0]["math_hash"] != attempts[1]["math_hash"] == row["math_hash"]
    assert attempts[0]["versions"] == attempts[1]["versions"]
    identities = [read(run_dir / CHECKPOINTS / f"step-{step:08d}") for step in (9, 12)]
    hashes = [manifest.record.identity["math_hash"] for manifest in identities]
    assert hashes == [entry["math_hash"] for entry in attempts]
    # From here on it is the run's own value.
    again = Launched(_again(finished, run_dir, change), tmp_path / "again")
    assert again.wait() == [0], again.output()
    log = (run_dir / "logs" / "rank-0.log").read_text()
    assert "configuration changed since the attempt before: optim.muon.learning_rate" in log
    assert _config(run_dir)["optim"]["muon"]["learning_rate"] == 0.01
    first = json.loads((run_dir / "configs" / "attempt-0001.json").read_text())
    assert first == before


def test_nothing_usable_is_no_fresh_start(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for manifest in (run_dir / CHECKPOINTS).glob("*/MANIFEST.json"):
        manifest.unlink()
    launched = Launched(_again(finished, run_dir), tmp_path / "out")
    assert launched.wait() == [3], launched.output()
    assert "no usable checkpoint" in launched.output()


def one_idle_step(tmp_path: Path, finished: Path, changes: dict[str, Any]) -> list[str]:
    """A run of one step whose learning rates move nothing."""
    still = {
        "optim.muon.learning_rate": 1e-30,
        "optim.adamw.learning_rate": 1e-30,
        "optim.balancing.learning_rate": 1e-30,
        "plan.phases": {"short": {**_phase(finished), "tokens": 256}},
    }
    return _again(finished, tmp_path / "run", {**still, **changes})


def _phase(finished: Path) -> dict[str, Any]:
    phase: dict[str, Any] = dict(_config(finished)["plan"]["phases"]["short"])
    return {**phase, "schedule": {"kind": "constant"}, "batch_ramp": None}


def test_export_start_from_it_and_export_again(finished: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["export-hf", str(finished), "--output", str(first)]) == 0
    yaml = tmp_path / "model.yaml"
    assert main(["import-hf", str(first), "--model-yaml", str(yaml)]) == 0
    assert "hidden_size: 16" in yaml.read_text().splitlines()

    words = one_idle_step(tmp_path, finished, {"checkpoint.initial_weights": str(first)})
    launched = Launched(words, tmp_path / "out")
    assert launched.wait() == [0], launched.output()
    assert f"weights from {first}" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert main(["export-hf", str(tmp_path / "run"), "--output", str(second)]) == 0
    ours, theirs = (from_hf(folder, torch.float32).state_dict() for folder in (first, second))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-20, msg=name)
    trained = load_full(finished / CHECKPOINTS / f"step-{TOTAL_STEPS:08d}", "model.")
    assert all(torch.equal(ours[n.removeprefix("model.")], t) for n, t in trained.items())


def test_initial_weights_of_another_model_are_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    assert main(["export-hf", str(finished), "--output", str(folder)]) == 0
    for changes, told in (
        ({"model.norm_eps": 1e-6}, "norm_eps is 1e-05 there, 1e-06 here"),
        ({"model.num_layers": 1}, "num_layers is 2 there, 1 here"),
    ):
        both = {"checkpoint.initial_weights": str(folder), **changes}
        launched = Launched(one_idle_step(tmp_path, finished, both), tmp_path / "out")
        assert launched.wait() == [3], launched.output()
        assert told in launched.output()


def test_bf16_checkpoints_hold_fp32_also_right_after_an_evaluation(
    finished: Path, tmp_path: Path
) -> None:
    changes = {"precision.compute_dtype": "bf16", "logging.eval_every_steps": 3}
    launched = Launched(_again(finished, tmp_path / "run", changes), tmp_path / "out")
    assert launched.wait() == [0], launched.output()
    ours, fp32 = steps_of(tmp_path / "run"), steps_of(finished)
    assert ours[-1]["loss"] < ours[0]["loss"]
    for row, reference in zip(ours, fp32, strict=True):
        assert row["applied"]
        assert row["loss"] == pytest.approx(reference["loss"], rel=0.02)
    for step in (8, 9, 12, 13):
        tensors = load_full(tmp_path / "run" / CHECKPOINTS / f"step-{step:08d}")
        assert {t.dtype for t in tensors.values()} == {torch.float32, torch.int64}


def test_lost_peer_ends_the_other_rank(corpora: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with signalling_itself(signal.SIGKILL, step=3, rank=1):
        launched = Launched(overrides(run_dir, corpora), tmp_path / "out", ranks=2)
    codes = launched.wait()
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == 1
    assert "rank 0: " in launched.output()
    assert "rank 0: " in (run_dir / "logs" / "rank-0.log").read_text()
