"""The cockpit's numbers against loads made by hand, and the advice they lead to."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.unit.test_report import LAUNCH, step_values
from zaya_train.config.errors import ConfigError, DataError
from zaya_train.config.schema import BalancingConfig
from zaya_train.main import main
from zaya_train.optim.balancing import BalancingController
from zaya_train.tools.report import report
from zaya_train.tools.router import advice, changed_gains, gains_of, layer_states
from zaya_train.train.metrics import MetricsWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from zaya_train.tools.router import LayerState

GAINS = BalancingConfig(learning_rate=0.01)
EVEN = [0.25, 0.25, 0.25, 0.25, 0.0]
Layers = list[list[float]]


def rows_of(loads: list[Layers], biases: list[Layers] | None = None) -> list[dict[str, Any]]:
    """One row a step, one load per layer of four experts and a skip class."""
    rows: list[dict[str, Any]] = [{"step": n, "load": load} for n, load in enumerate(loads, 1)]
    for row, bias in zip(rows, biases or [], strict=False):
        row["balancing_bias"] = bias
    return rows


def state_of(loads: list[list[float]], biases: list[list[float]] | None = None) -> LayerState:
    rows = rows_of([[load] for load in loads], [[bias] for bias in biases] if biases else None)
    return layer_states(rows, 4, GAINS)[0]


def test_a_layer_by_hand() -> None:
    state = state_of([[0.5, 0.3, 0.1, 0.0, 0.1], [0.3, 0.5, 0.1, 0.0, 0.1]])
    # Experts share 0.9: the busiest of either step has 5/9, of both together 4/9.
    assert state.max_violation == pytest.approx(4 * 5 / 9 - 1)
    assert state.lasting_violation == pytest.approx(4 * 4 / 9 - 1)
    assert (state.weakest, state.weakest_share) == (3, 0.0)
    assert state.skip_rate == pytest.approx(0.1)
    assert (state.dead_expert, state.dead_steps) == (3, 2)
    assert np.isnan(state.bias_span) and np.isnan(state.turning)
    # Target 1/4 each; the skip class is left alone.
    assert state.error == pytest.approx(0.25) and state.average == pytest.approx(0.25)


def test_the_dead_clock_counts_steps_back_to_the_last_token() -> None:
    dead = [0.5, 0.5 - 0.002, 0.002, 0.0, 0.0]
    loads = [EVEN] * 3 + [dead] * 5
    assert (state_of(loads).dead_expert, state_of(loads).dead_steps) == (2, 5)
    assert state_of([*loads, EVEN]).dead_expert is None
    rows = rows_of([[load] for load in loads])
    for row in rows:
        row["step"] *= 10  # logging.every_steps
    assert layer_states(rows, 4, GAINS)[0].dead_steps == 50


def test_the_terms_are_the_controllers_own() -> None:
    generator = np.random.default_rng(0)
    loads = generator.dirichlet(np.ones(5), size=(80, 2))
    controller = BalancingController([torch.zeros(5), torch.zeros(5)], 4, GAINS)
    for load in loads:
        controller.step(torch.from_numpy(load).float())
    states = layer_states(rows_of(loads.tolist()), 4, GAINS)
    expected = (controller.first / (1 - GAINS.beta1**80)).abs().amax(dim=1)
    assert [s.average for s in states] == pytest.approx(expected.tolist(), rel=1e-5)
    wide = (controller.second / (1 - GAINS.beta2**80)).mean(dim=1).sqrt()
    assert [s.scale for s in states] == pytest.approx(wide.tolist(), rel=1e-5)
    error = np.abs(loads[-1][:, :4] - 0.25).max(axis=1)
    assert [s.error for s in states] == pytest.approx(error.tolist(), rel=1e-4)


def test_terms_are_the_controllers_where_only_every_tenth_step_is_logged() -> None:
    # Each load lasts for the ten steps up to its row, so that the rows tell all there was.
    generator = np.random.default_rng(1)
    logged = generator.dirichlet(np.ones(5), size=(12, 1))
    controller = BalancingController([torch.zeros(5)], 4, GAINS)
    for load in np.repeat(logged, 10, axis=0):
        controller.step(torch.from_numpy(load).float())
    swing: list[Layers] = [[[0.1 * (-1) ** n, 0.0, 0.0, 0.0, -1.0]] for n in range(12)]
    rows = rows_of(logged.tolist(), swing)
    for row in rows:
        row["step"] *= 10  # logging.every_steps
    (state,) = layer_states(rows, 4, GAINS)
    first = (controller.first / (1 - GAINS.beta1**120)).abs().max()
    second = (controller.second / (1 - GAINS.beta2**120)).mean().sqrt()
    assert state.average == pytest.approx(float(first), rel=1e-4)
    assert state.scale == pytest.approx(float(second), rel=1e-4)
    assert np.isnan(state.turning) and state.bias_span == pytest.approx(0.1)
    calm = replace(state, dead_expert=None, lasting_violation=0.0, skip_rate=0.0)
    assert "nothing to do" in advice([calm], GAINS)[0]


def test_biases_that_swing_turn_round_at_every_step() -> None:
    swing = [[0.1 * (-1) ** n, 0.0, 0.0, 0.0, -1.0] for n in range(30)]
    climb = [[0.01 * n, -0.01 * n, 0.0, 0.0, -1.0] for n in range(30)]
    assert state_of([EVEN] * 30, swing).turning == pytest.approx(1 / 4)
    assert state_of([EVEN] * 30, climb).turning == 0
    assert state_of([EVEN] * 30, climb).bias_span == pytest.approx(0.58)  # without the skip class


CALM = state_of([EVEN] * 30, [[0.0, 0.0, 0.0, 0.0, -1.0]] * 30)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "nothing to do"),
        ({"dead_expert": 2, "dead_steps": 40}, "expert 2 has had nearly no token for 40 steps"),
        ({"dead_expert": 2, "dead_steps": 3}, "nothing to do"),
        ({"turning": 0.9}, "turn round at 90 % of the steps"),
        ({"lasting_violation": 0.9, "busiest": 3}, "expert 3 gets 1.9 times its share"),
        ({"bias_span": 1.2}, "biases lie 1.20 apart"),
        ({"skip_rate": 0.3}, "1 layers send more than 5 % of tokens past the experts"),
    ],
)
def test_advice_names_layer_and_knob(change: dict[str, Any], said: str) -> None:
    (line,) = advice([replace(CALM, **change)], GAINS)
    assert said in line
    if said != "nothing to do":
        assert "optim.balancing." in line and ("layer 0" in line)


def test_a_skip_share_that_was_asked_for_is_no_finding() -> None:
    (line,) = advice([replace(CALM, skip_rate=0.3)], replace(GAINS, skip_target=0.25))
    assert "nothing to do" in line


def test_gains_are_changed_by_name() -> None:
    changed = changed_gains(GAINS, "learning_rate=0.003,beta1=0.8")
    assert changed == replace(GAINS, learning_rate=0.003, beta1=0.8)
    assert changed_gains(replace(GAINS, skip_target=0.1), "skip_target=null").skip_target is None
    with pytest.raises(ConfigError, match="--gains rate=1: no gain of that name; there are learn"):
        changed_gains(GAINS, "rate=1")
    with pytest.raises(ConfigError, match="'much' is no number"):
        changed_gains(GAINS, "beta1=much")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("learning_rate=null", r"--gains\.learning_rate: "),
        ("learning_rate=0", r"optim\.balancing\.learning_rate: 0\.0 must be positive"),
        ("learning_rate=nan", r"optim\.balancing\.learning_rate: nan must be positive"),
        ("beta1=2", r"optim\.balancing\.beta1: 2\.0 must lie in \[0, 1\)"),
        ("eps=inf", r"optim\.balancing\.eps: inf must be positive and finite"),
        ("skip_target=1", r"optim\.balancing\.skip_target: 1\.0 must lie in \[0, 1\)"),
    ],
)
def test_gains_that_a_configuration_may_not_have_are_refused(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        changed_gains(GAINS, words)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Thirty even steps of two experts and a skip class, and the configuration of that model."""
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        metrics.write("start", step=0, **LAUNCH)
        for step in range(1, 31):
            values = step_values(step, 1.0) | {"load": [[0.5, 0.5, 0.0]] * 3}
            metrics.write("step", **values)
    config = {"model": {"num_experts": 2}, "optim": {"balancing": {"learning_rate": 0.01}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_command_and_the_report_say_the_same(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gains_of(run_dir) == (GAINS, 2)
    assert main(["router", str(run_dir)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing to do: loads are even" in said and "No what-if: nothing was traced" in said
    page = report([run_dir], run_dir / "report.html").read_text()
    assert '<section id="router">' in page and "nothing to do: loads are even" in page
    assert main(["router", str(run_dir), "--gains", "beta1=0.5"]) == 2  # there is no trace


def empty_folder(run_dir: Path) -> None:
    (run_dir / "routing").mkdir()


def no_optim(run_dir: Path) -> None:
    (run_dir / "config.json").write_text(json.dumps({"model": {"num_experts": 2}}))


def another_version(run_dir: Path) -> None:
    config = {"model": {"num_experts": 2}, "optim": {"balancing": {"rate": 1.0}}}
    (run_dir / "config.json").write_text(json.dumps(config))


def damaged(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        empty_folder(run_dir)
        path = run_dir / "routing" / "step-00000003.npz"
        np.savez_compressed(path, counts=np.arange(10_000))
        path.write_bytes(content(path.read_bytes()))

    return change


def garbled(whole: bytes) -> bytes:
    """The compressed bytes turned round, the archive's lists as they were."""
    middle = slice(100, 1_000)
    return whole[:100] + bytes(255 - byte for byte in whole[middle]) + whole[1_000:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (empty_folder, "No what-if: nothing was traced"),
        (no_optim, "Not shown: .*config.json: lacks .*optim"),
        (another_version, "Not shown: optim.balancing.rate: unknown key"),
        (damaged(lambda whole: whole[:500]), "Not shown: .*step-00000003.npz: not a step"),
        (damaged(lambda whole: b""), "Not shown: .*step-00000003.npz: not a step"),
        (damaged(garbled), "Not shown: .*step-00000003.npz: not a step"),
    ],
)
def test_what_the_cockpit_cannot_read_does_not_take_the_report_down(
    run_dir: Path, change: Callable[[Path], None], said: str
) -> None:
    change(run_dir)
    page = report([run_dir], run_dir / "report.html").read_text()
    assert re.search(f'<section id="router">.*{said}', page)
    assert '<section id="phases">' in page


def test_a_run_without_configuration_or_steps_is_told_in_one_line(run_dir: Path) -> None:
    (run_dir / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json: missing; the gains"):
        gains_of(run_dir)
    assert "The run kept no configuration" in report([run_dir], run_dir / "r.html").read_text()
    assert main(["router", str(run_dir)]) == 2
