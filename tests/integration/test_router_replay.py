"""The routing trace of a real run, replayed: the recorded gains give the recorded curve to the last
bit, other gains another one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.integration.runs import left_alone, make_corpora
from zaya_train.config.errors import DataError
from zaya_train.config.schema import BalancingConfig, LoggingConfig
from zaya_train.main import main
from zaya_train.optim.balancing import BalancingController
from zaya_train.tools.report import report
from zaya_train.tools.router_replay import TracedStep, as_recorded, read_trace, replay
from zaya_train.train.loop import load_summary
from zaya_train.train.metrics import read_metrics
from zaya_train.train.trace import RoutingTrace

if TYPE_CHECKING:
    from pathlib import Path

GAINS = BalancingConfig(learning_rate=0.01)
"""As tests.helpers.tiny has them."""
EXPERTS = 3
FIRST, STEPS = 3, 9


@pytest.fixture(scope="module")
def traced_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, so that the sample is half the tokens at most; steps of both phases are traced."""
    folder = tmp_path_factory.mktemp("traced")
    trace = {"logging.trace_first_step": FIRST, "logging.trace_steps": STEPS}
    corpora = make_corpora(folder / "corpus")
    return left_alone(folder, corpora, {**trace, "logging.trace_tokens": 50}, ranks=2)


@pytest.fixture(scope="module")
def trace(traced_run: Path) -> list[TracedStep]:
    return read_trace(traced_run)


def test_only_the_asked_steps_are_traced(trace: list[TracedStep]) -> None:
    assert [traced.step for traced in trace] == [*range(FIRST, FIRST + STEPS)]
    assert all(traced.probabilities.shape == (2, 50, EXPERTS + 1) for traced in trace)
    assert all(np.allclose(traced.probabilities.sum(axis=2), 1.0) for traced in trace)


def test_the_sample_chose_what_the_model_chose(traced_run: Path, trace: list[TracedStep]) -> None:
    for traced in trace:
        biased = traced.probabilities + traced.bias[:, None, :]
        with np.load(traced_run / "routing" / f"step-{traced.step:08d}.npz") as arrays:
            assert np.array_equal(biased.argmax(axis=2), arrays["choice"])


def test_the_recorded_gains_give_the_recorded_curve_exactly(
    traced_run: Path, trace: list[TracedStep]
) -> None:
    again = replay(trace, EXPERTS, GAINS)
    rows = {row["step"]: row for row in read_metrics(traced_run) if row["kind"] == "step"}
    for traced, load, bias in zip(trace, again.loads, again.biases, strict=True):
        assert np.array_equal(load, traced.counts)
        assert np.array_equal(bias, traced.bias)
        told = load_summary(torch.from_numpy(load), EXPERTS)
        for key in ("load_entropy", "max_violation", "skip_rate"):
            assert told[key] == rows[traced.step][key], key
    assert not again.moved.any()


def redone(steps: list[TracedStep]) -> list[TracedStep]:
    """The same steps with other loads, from the same controller on."""
    begin = steps[0]
    controller = BalancingController(list(torch.from_numpy(begin.bias.copy())), EXPERTS, GAINS)
    controller.first.copy_(torch.from_numpy(begin.first))
    controller.second.copy_(torch.from_numpy(begin.second))
    controller.steps.fill_(begin.steps)
    made = []
    for traced in steps:
        first, second = controller.first.numpy().copy(), controller.second.numpy().copy()
        bias = torch.stack(controller.biases).numpy()
        counts = traced.counts[:, ::-1].copy()
        began = (bias, first, second, int(controller.steps))
        made.append(TracedStep(traced.step, counts, *began, traced.probabilities, True))
        controller.step(torch.from_numpy(counts).float())
    return made


def test_the_part_that_the_gains_made_is_replayed(
    trace: list[TracedStep], traced_run: Path, tmp_path: Path
) -> None:
    assert as_recorded(trace, EXPERTS, GAINS) == trace
    # Back to where step 6 begins, and on to step 8 over other rows; 9 to 11 are from before.
    kept = as_recorded([*trace[:3], *redone(trace[3:6]), *trace[6:]], EXPERTS, GAINS)
    assert [t.step for t in kept] == [3, 4, 5, 6, 7, 8]
    # Other gains made all of it: no two steps belong together, the newest is left.
    for change in ({"learning_rate": 0.005}, {"beta1": 0.8}, {"skip_target": 0.3}):
        assert as_recorded(trace, EXPERTS, replace(GAINS, **change)) == trace[-1:], change
    shutil.copytree(traced_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["optim"]["balancing"]["learning_rate"] = 0.02
    path.write_text(json.dumps(config))
    page = report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert f"{STEPS - 1} traced steps are not replayed" in page


def test_tokens_change_classes_and_none_is_lost(trace: list[TracedStep]) -> None:
    eager = replay(trace, EXPERTS, replace(GAINS, learning_rate=0.05))
    assert not np.array_equal(eager.biases[-1], trace[-1].bias) and eager.moved.max() > 0
    totals = np.stack([traced.counts.sum(axis=1) for traced in trace])
    assert np.allclose(eager.loads.sum(axis=2), totals) and (eager.loads >= 0).all()


def crowded_trace(steps: int = 60, tokens: int = 400) -> list[TracedStep]:
    """Made by hand: one layer whose tokens all like expert 0 a little, and a controller at rest."""
    generator = np.random.default_rng(0)
    liked = np.array([0.8, 0.0, 0.0, 0.0])
    rest = np.zeros((1, 4), np.float32)
    made = []
    for step in range(steps):
        scores = np.exp(generator.normal(size=(1, tokens, 4)) + liked)
        probabilities = (scores / scores.sum(axis=2, keepdims=True)).astype(np.float32)
        counts = np.bincount(probabilities[0].argmax(axis=1), minlength=4)[None]
        made.append(TracedStep(step, counts, rest, rest, rest, 0, probabilities, True))
    return made


def test_gains_that_act_even_a_load_out_which_none_leave_uneven() -> None:
    made = crowded_trace()

    def busiest(learning_rate: float) -> float:
        gains = BalancingConfig(learning_rate=learning_rate)
        return float(replay(made, 4, gains).loads[-10:, 0, 0].mean())

    assert busiest(0.0) == np.mean([traced.counts[0, 0] for traced in made[-10:]]) > 170
    assert busiest(0.001) > busiest(0.003) + 10 > 110
    assert 85 < busiest(0.01) < 115


def test_a_skipped_step_leaves_the_controller_alone(trace: list[TracedStep]) -> None:
    skipped = [trace[0], replace(trace[1], applied=False), *trace[2:3]]
    again = replay(skipped, EXPERTS, GAINS)
    assert np.array_equal(again.biases[2], again.biases[1])


def test_the_command_and_the_report_show_what_if(
    traced_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["router", str(traced_run), "--gains", "learning_rate=0.05"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "what if, steps 3 to 11" in said and "rate 0.05 betas 0.9" in said
    page = report([traced_run], traced_run / "report.html").read_text()
    assert "What if: steps 3 to 11 under other gains" in page and "rate 0.03 betas" in page


def test_a_full_disk_ends_the_trace_and_not_the_run(
    trace: list[TracedStep], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "routing").write_text("in the way")
    routing = RoutingTrace(tmp_path, LoggingConfig(trace_steps=5), enabled=True)

    class Recorded:
        def arrays(self, result: object) -> dict[str, object]:
            return {"counts": trace[0].counts}

    routing.write(1, Recorded(), None)  # type: ignore[arg-type]
    assert "no more routing is recorded" in caplog.text
    with routing.recording(None, None, 2) as recorder:  # type: ignore[arg-type]
        assert recorder is None


def test_of_a_broken_trace_the_newest_part_is_read(traced_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "routing"
    folder.mkdir()
    for step in (3, 4, 6, 7):
        name = f"step-{step:08d}.npz"
        (folder / name).write_bytes((traced_run / "routing" / name).read_bytes())
    assert [traced.step for traced in read_trace(tmp_path)] == [6, 7]
    (folder / "step-00000006.npz").write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"step-00000006\.npz: not a step"):
        read_trace(tmp_path)
    with pytest.raises(DataError, match=r"no routing trace; train with logging\.trace_steps"):
        read_trace(tmp_path / "elsewhere")
