"""optim.z_loss on several ranks: normalised, reported and kept out of evaluations as on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from tests.dist.harness import ROWS, Case, Part, Setup, all_logits, relative, rows_of_step, together
from tests.dist.test_step import Steps, phase_run
from tests.helpers.distributed import run_ranks
from zaya_train.train.loop import run_phase
from zaya_train.train.metrics import read_metrics
from zaya_train.train.state import TrainState

if TYPE_CHECKING:
    from pathlib import Path

    from tests.dist.harness import Logits

COEFFICIENT = 0.05
ON = {"optim.z_loss": COEFFICIENT, "optim.clip_norm": 0.0}
OFF = {"optim.clip_norm": 0.0}
SERIAL = Case()
CASES = [
    Case(context=2, micro_rows=2, recompute="full"),
    Case(shard=2, expert=2, accumulation="reduce_each"),
    Case(replicate=2, kernels="native"),
]
HELD_OUT = 90
"""The rows of this step are those of Setup.validation's `three`, and another one."""
TOLERANCE = 1e-5
"""As between layouts without z-loss (test_parity): fp32's rounding in another order."""


@dataclass(frozen=True, repr=False)
class Seen:
    """A step with z-loss, and the same one without."""

    losses: list[float]
    z_losses: list[float]
    gradients: list[dict[str, Part]]
    validation: list[dict[str, float]]
    logits: list[list[Logits]]
    """Of the step's rows and of HELD_OUT's, before it."""


def both_ways(case: Case) -> Seen:
    seen = Seen([], [], [], [], [])
    for changes in (ON, OFF):
        setup = Setup.of(case, **changes)
        setup.record_gradients()
        seen.validation.append(setup.validation())
        seen.logits[:] = [setup.logits(0), setup.logits(HELD_OUT)]
        result = setup.step(0)
        seen.losses.append(result.loss)
        seen.z_losses.append(result.z_loss)
        seen.gradients.append(setup.clipped)
    return seen


def on_ranks(cases: list[Case]) -> list[Seen]:
    return [both_ways(case) for case in cases]


@pytest.fixture(scope="module")
def serial() -> Seen:
    return run_ranks(on_ranks, 1, [SERIAL])[0][0]


def by_formula(logits: list[Logits], step: int, rows: int = ROWS) -> tuple[float, float]:
    """Cross-entropy and z-loss, means over the supervised tokens of a step's first rows."""
    found = torch.from_numpy(all_logits([logits])).double()[:rows]
    labels = torch.stack([torch.as_tensor(row.labels) for row in rows_of_step(step)[:rows]])
    sizes = found.logsumexp(dim=-1)[labels >= 0]
    loss = torch.nn.functional.cross_entropy(found[labels >= 0], labels[labels >= 0])
    return float(loss), float(COEFFICIENT * sizes.square().mean())


def test_a_step_adds_the_mean_over_its_supervised_tokens(serial: Seen) -> None:
    loss, z_loss = by_formula(serial.logits[0], 0)
    assert serial.losses == pytest.approx([loss, loss], rel=1e-6)
    assert serial.z_losses == [pytest.approx(z_loss, rel=1e-6), 0.0]


def test_evaluations_are_without_it(serial: Seen) -> None:
    loss, z_loss = by_formula(serial.logits[1], HELD_OUT, rows=3)
    assert z_loss > 0.1 * loss
    assert serial.validation[0]["three"] == pytest.approx(loss, rel=1e-6)
    assert serial.validation[0] == serial.validation[1]


def test_it_is_trained_on(serial: Seen) -> None:
    on, off = (together([found["embedding"]]) for found in serial.gradients)
    assert relative(on, off) > 0.01


def test_layouts_of_ranks_agree_with_one_process(serial: Seen) -> None:
    ranks = run_ranks(on_ranks, 2, CASES)
    for i, case in enumerate(CASES):
        seen = [rank[i] for rank in ranks]
        for found in seen:
            assert found.losses == pytest.approx(serial.losses, rel=TOLERANCE), case.name
            assert found.z_losses == pytest.approx(serial.z_losses, rel=TOLERANCE), case.name
            assert found.validation[0] == found.validation[1]
        for name, expected in serial.gradients[0].items():
            parts = [rank.gradients[0][name] for rank in seen if name in rank.gradients[0]]
            error = relative(together(parts), together([expected]))
            assert error < TOLERANCE, (case.name, name)


def phase_with(folder: Path, changes: dict[str, float]) -> None:
    setup = Setup.of(SERIAL, **changes)
    run_phase(phase_run(setup, folder, [], [0]), Steps(setup.batches(0)), TrainState())


def test_rows_of_the_metrics_have_both_where_it_is_on(tmp_path: Path, serial: Seen) -> None:
    for name, changes in (("on", ON), ("off", OFF)):
        run_ranks(phase_with, 1, tmp_path / name, changes)
        rows = [row for row in read_metrics(tmp_path / name) if row["kind"] == "step"]
        assert len(rows) == 8 and all(("z_loss" in row) is (name == "on") for row in rows)
        assert rows[0]["loss"] == pytest.approx(serial.losses[0], rel=TOLERANCE)
        assert rows[0].get("z_loss", 0.0) == pytest.approx(serial.z_losses[name == "off"])
