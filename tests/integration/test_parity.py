"""`zaya parity` on real steps of a tiny model, and of the smoke recipe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from zaya_kernels.grouped_mlp import fp8_emulated, op

from tests.helpers.mutation import mutated
from tests.helpers.tiny import PHASE
from tests.integration.runs import Launched, make_corpora, overrides_for, values_for
from zaya_train.main import main
from zaya_train.run import CHECKPOINTS
from zaya_train.train.metrics import read_metrics

if TYPE_CHECKING:
    from pathlib import Path

FP8 = {
    "plan.phases": {"short": {**PHASE, "tokens": 4 * 256}},
    "parallel.context_parallel_limit": 1,
    "checkpoint.every_steps": 2,
    "precision": {"compute_dtype": "bf16", "expert_dtype": "fp8"},
    "kernels": {"grouped_mlp": "fp8_emulated"},
}
WITHOUT = {**FP8, "precision": {"compute_dtype": "bf16"}, "kernels": {}}


SHORT = "plan.phases.short"
RAMP = [f"+{SHORT}.batch_ramp.start_tokens=64", f"+{SHORT}.batch_ramp.over_tokens=256"]
"""Sixteen rows in steps of 1, 1, 2, 4, 4, 4."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> dict[str, Path]:
    """What `zaya train` makes of both configurations."""
    folder = tmp_path_factory.mktemp("runs")
    launched = {}
    for name, changes in (("without", WITHOUT), ("fp8", FP8)):
        values = values_for(folder / name / "run", corpora, changes)
        launched[name] = Launched(overrides_for(values), folder / name)
    for run in launched.values():
        assert run.wait() == [0], run.output()
    return {name: folder / name / "run" for name in launched}


def words(folder: Path, corpora: Path, *more: str, steps: int = 4) -> list[str]:
    overrides = overrides_for(values_for(folder / "run", corpora, FP8))
    return [*overrides, *more, "--steps", str(steps), "--output", str(folder)]


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "parity.json").read_text())
    return found


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if row["kind"] == "step"]


def test_curves_are_those_that_training_gives(
    runs: dict[str, Path], corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, with and without fp8; and nothing is left where the run would be."""
    assert main(["parity", *words(tmp_path, corpora)]) == 0
    assert "fp8 holds over 4 steps of short from step 1 on" in capsys.readouterr().out
    found = read(tmp_path)
    for name, run in runs.items():
        assert found["curves"][name]["losses"] == losses(run)
    curves = found["curves"]
    assert curves["fp8"]["losses"] != curves["without"]["losses"]
    # Another rounding moves gradients, by less than fp8.
    errors = {n: list(c["gradient_errors"].values()) for n, c in curves.items()}
    assert set(errors["without"]) == {0.0} and len(errors["fp8"]) == 4
    assert 0 < max(errors["rounding"]) < 0.02 < min(errors["fp8"])
    assert [path.name for path in tmp_path.iterdir()] == ["parity.json"]


@pytest.mark.parametrize("name", ["without", "fp8"])
def test_it_goes_on_from_a_checkpoint(
    name: str,
    runs: dict[str, Path],
    corpora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights, optimizer and place in the data: the rest of the curve, bit for bit. So a checkpoint
    needs nothing of fp8."""
    branch = f"checkpoint.branch_from={runs[name] / CHECKPOINTS / 'step-00000002'}"
    assert main(["parity", *words(tmp_path, corpora, branch, steps=2)]) == 0
    found = read(tmp_path)
    assert found["first_step"] == 3
    assert found["curves"][name]["losses"] == losses(runs[name])[2:]
    assert main(["parity", *words(tmp_path, corpora, branch, steps=3)]) == 2
    assert "phase short has 2 steps left" in capsys.readouterr().err


def test_two_ranks_come_to_the_same(runs: dict[str, Path], corpora: Path, tmp_path: Path) -> None:
    """Each holds half of every gradient; fp8's scales are of other rows, so to its rounding."""
    launched = Launched(words(tmp_path, corpora, steps=2), tmp_path / "two", 2, "parity")
    assert launched.wait() == [0, 0], launched.output()
    found = read(tmp_path)["curves"]
    assert found["without"]["losses"] == pytest.approx(losses(runs["without"])[:2], rel=1e-4)
    assert set(found["without"]["gradient_errors"].values()) == {0.0}
    assert all(0.02 < error < 0.15 for error in found["fp8"]["gradient_errors"].values())


BUGS = {
    "scale not taken back": ("* (left.inverse * right.inverse)", "* left.inverse"),
    "gradients of other rows": (
        "incoming = scaled(grad[span],",
        "incoming = scaled(grad[span].flip(0),",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_fp8_does_not_hold(
    bug: str,
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    planted = mutated(fp8_emulated, *BUGS[bug], tmp_path)
    monkeypatch.setitem(op.FP8_BACKENDS, "fp8_emulated", planted.grouped_mlp_fp8_emulated)
    assert main(["parity", *words(tmp_path, corpora, steps=1)]) == 1
    told = capsys.readouterr().out
    assert "FAILED experts' gradients of the first step" in told and "does not hold" in told


def test_steps_that_fp8_alone_skips_do_not_hold(
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = op.FP8_BACKENDS["fp8_emulated"]

    def broken(*arguments: Any) -> torch.Tensor:
        return good(*arguments) * float("nan")

    monkeypatch.setitem(op.FP8_BACKENDS, "fp8_emulated", broken)
    assert main(["parity", *words(tmp_path, corpora, steps=1)]) == 1
    assert "FAILED steps skipped 1, limit 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "steps", "expected"),
    [
        (["precision.expert_dtype=compute_dtype", "kernels.grouped_mlp=eager"], 1, "expert_dtype="),
        ([], 0, "--steps 0: must be at least 1"),
        ([], 5, "--steps 5: phase short has 4 steps left"),
        ([f"{SHORT}.tokens=1088"], 6, "--steps 6: phase short has 5 steps left"),
        (RAMP, 7, "--steps 7: phase short has 6 steps left"),
        (["kernels.grouped_mlp=eager"], 1, "needs transformer_engine, or slowly"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    more: list[str],
    steps: int,
    expected: str,
    corpora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["parity", *words(tmp_path, corpora, *more, steps=steps)]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "parity.json").exists()


def test_all_steps_of_a_ramp_and_the_part_of_one_behind_it_are_compared(
    corpora: Path, tmp_path: Path
) -> None:
    more = [*RAMP, f"{SHORT}.tokens=1088"]
    assert main(["parity", *words(tmp_path, corpora, *more, steps=7)]) == 0
    assert len(read(tmp_path)["curves"]["fp8"]["losses"]) == 7


def test_a_checkpoint_at_the_end_of_the_plan_is_refused(
    runs: dict[str, Path], corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = runs["without"] / CHECKPOINTS / "step-00000004"
    assert main(["parity", *words(tmp_path, corpora, f"checkpoint.branch_from={branch}")]) == 2
    assert f"{branch} ends the plan" in capsys.readouterr().err


def smoke(corpora: Path) -> list[str]:
    """The smoke recipe in fp8, on a small corpus."""
    train, heldout = corpora / "train" / "train", corpora / "heldout" / "train"
    return [
        "recipe=smoke_cpu", "precision=fp8_experts", "runtime.threads=1",
        f"data.sources.reasoning.path={train}", f"data.sources.text.path={train}",
        f"data.validation.reasoning.path={heldout}",
    ]  # fmt: skip


def smaller(corpora: Path, folder: Path, steps: int) -> list[str]:
    """The smoke recipe with two of its layers."""
    base = [
        *smoke(corpora), "model.num_layers=2", "kernels.grouped_mlp=fp8_emulated",
        "plan.phases.pretrain_1.global_batch_tokens=1024",
    ]  # fmt: skip
    return [*base, "--steps", str(steps), "--output", str(folder)]


def test_the_smoke_recipe_holds(corpora: Path, tmp_path: Path) -> None:
    assert main(["parity", *smaller(corpora, tmp_path, 2)]) == 0


def test_the_smoke_recipe_does_not_hold_without_scales(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients vanish in e5m2; the loss of so few steps does not see it, experts' do."""
    dropped = ("(largest > 0) & largest.isfinite()", "largest < 0")
    planted = mutated(fp8_emulated, *dropped, tmp_path)
    monkeypatch.setitem(op.FP8_BACKENDS, "fp8_emulated", planted.grouped_mlp_fp8_emulated)
    assert main(["parity", *smaller(corpora, tmp_path, 1)]) == 1
    loss, gradients, _ = read(tmp_path)["findings"]
    assert loss["holds"] and not gradients["holds"] and gradients["value"] > 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("backend", op.FP8_BACKENDS.keys() - {"transformer_engine"})
def test_the_smoke_recipe_holds_for_long(backend: str, corpora: Path, tmp_path: Path) -> None:
    options = ["--steps", "60", "--output", str(tmp_path)]
    assert main(["parity", *smoke(corpora), f"kernels.grouped_mlp={backend}", *options]) == 0


@pytest.mark.gpu
def test_the_library_holds_on_the_smoke_recipe(corpora: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine", reason="transformer_engine is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    options = ["--steps", "20", "--output", str(tmp_path)]
    words = [*smoke(corpora), "kernels.grouped_mlp=transformer_engine", *options]
    assert main(["parity", *words]) == 0
