"""`zaya bench step` on a small model: figures, table and trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from zaya_train.main import main
from zaya_train.runtime.peaks import Peaks

if TYPE_CHECKING:
    from pathlib import Path

PHASE = "plan.phases.pretrain_1"
SMALL = [
    "bench", "step", "recipe=smoke_cpu", "model.num_layers=2", "runtime.threads=1",
    f"{PHASE}.micro_batch_sequences=1", f"{PHASE}.global_batch_tokens=512",
]  # fmt: skip
STEP_TOKENS, ROW_TOKENS = 512, 128


def bench(folder: Path, *words: str) -> dict[str, Any]:
    assert main([*SMALL, "--output", str(folder), *words]) == 0
    figures: dict[str, Any] = json.loads((folder / "step.json").read_text())
    return figures


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    found = bench(folder, "--warm", "1", "--steps", "3", "--document-tokens", "48")
    trace = json.loads((folder / "trace.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["step.json", "trace.json"]
    return {**found, "trace": trace}


def test_speed_is_the_timed_steps_tokens_over_their_seconds(figures: dict[str, Any]) -> None:
    steps = figures["steps"]
    assert len(steps) == 3 and all(step["applied"] for step in steps)
    for step in steps:
        expected = STEP_TOKENS / step["step_seconds"]
        assert step["tokens_per_second"] == pytest.approx(expected)
    assert figures["step_seconds"] == sorted(step["step_seconds"] for step in steps)[1]
    assert figures["tokens_per_second"] == pytest.approx(STEP_TOKENS / figures["step_seconds"])
    assert figures["step_tokens"] == STEP_TOKENS and figures["memory_bytes"] > 0


def test_the_table_adds_up_to_the_profiled_step(figures: dict[str, Any]) -> None:
    profile = figures["profile"]
    assert sum(profile["seconds"].values()) == pytest.approx(profile["total_seconds"])
    # Every operation of the model is in it.
    assert all(seconds > 0 for seconds in profile["seconds"].values())
    steps = [e for e in figures["trace"]["traceEvents"] if e.get("name") == "zaya::step"]
    assert len(steps) == 1 and profile["clock"] == "host"
    assert profile["total_seconds"] == pytest.approx(steps[0]["dur"] / 1e6)


def test_the_profile_has_the_micro_batches_asked_for(figures: dict[str, Any]) -> None:
    assert (figures["micro_batches"], figures["profile"]["micro_batches"]) == (4, 2)
    names = [event.get("name") for event in figures["trace"]["traceEvents"]]
    assert names.count("zaya::forward") == names.count("zaya::linear_cross_entropy") == 2
    # Two layers in two micro-batches.
    assert names.count("zaya::cca") == 2 * 4 and names.count("zaya::moe") == 4


def test_operations_of_documents_of_unequal_length(figures: dict[str, Any], tmp_path: Path) -> None:
    assert figures["documents"] == [48, 48, 32]
    # Attention sees fewer pairs within documents; everything else is the same.
    whole = bench(tmp_path, "--warm", "0", "--steps", "1", "--profiled", "0")
    pairs = {n: n * (n + 1) // 2 for n in (32, 48, 128)}
    fewer = (pairs[128] - 2 * pairs[48] - pairs[32]) / ROW_TOKENS
    # Two products a pair and head (2 layers, 4 heads of 32), three times over with the backward.
    expected = 3 * 2 * 2 * 2 * 4 * 32 * fewer
    # Two targets more a row: a document's last token has none.
    loss = 3 * 2 * 264 * 128 * 2 / ROW_TOKENS
    found = whole["flops_per_token"] - figures["flops_per_token"]
    assert found == pytest.approx(expected + loss)


def test_utilisation_is_speed_times_operations_over_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = Peaks("a device", data_sheet=1e12, source="a sheet", measured=5e11)
    monkeypatch.setattr("zaya_train.tools.bench_step.peaks_of", lambda device, dtype: peaks)
    found = bench(tmp_path, "--warm", "0", "--steps", "1", "--profiled", "0")
    speed = found["tokens_per_second"] * found["flops_per_token"]
    assert found["mfu"] == pytest.approx(speed / 1e12)
    assert found["mfu_measured"] == pytest.approx(speed / 5e11)
    # Nothing was profiled, so there is nothing of it.
    assert found["profile"] is None and not (tmp_path / "trace.json").exists()
    assert "MFU" in capsys.readouterr().out


def test_no_data_sheet_no_utilisation(figures: dict[str, Any]) -> None:
    assert figures["mfu"] is None and figures["mfu_measured"] > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--phase", "pretrain"], "--phase pretrain: no such phase; did you mean pretrain_"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--warm", "-1"], "--warm -1: must be at least 0"),
        (["--document-tokens", "129"], "--document-tokens 129: must be 2 to a row's 128"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--output", str(tmp_path / "out"), *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_ranks_under_torchrun_share_the_step(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*launch, "--nproc-per-node", "2", "-m", "zaya_train", *SMALL]
    options = ["--output", str(tmp_path), "--warm", "1", "--steps", "1"]
    subprocess.run([*words, *options], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    figures = json.loads((tmp_path / "step.json").read_text())
    assert (figures["ranks"], figures["micro_batches"]) == (2, 2)
    assert figures["steps"][0]["tokens_per_second"] == pytest.approx(
        STEP_TOKENS / figures["steps"][0]["step_seconds"]
    )
    assert figures["profile"]["seconds"]["collectives"] > 0


def test_a_model_larger_than_the_machine_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU too, before weights are made: a terabyte of them here."""
    words = ["recipe=zaya1_8b_1gpu", "model.num_layers=1200", "runtime.device=cpu"]
    assert main(["bench", "step", *words, "--output", str(tmp_path)]) == 2
    assert " for each of 1 ranks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
