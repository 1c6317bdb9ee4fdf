"""When weights are gathered, and which step a fault is told with."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.dist.harness import Case, Setup
from tests.dist.test_step import SCALE, Fault, Steps, phase_run
from tests.helpers.distributed import RankError, run_ranks
from tests.helpers.traffic import Traffic
from zaya_train.train import step
from zaya_train.train.loop import run_phase
from zaya_train.train.state import TrainState

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from zaya_train.model.interfaces import Route


def gathers_before_each_route(case: Case) -> list[int]:
    """All-gathers of a forward pass that were launched before the host waits in each layer."""
    setup = Setup.of(case)
    batch, dispatcher, seen = setup.batches(0)[0], setup.model.around.dispatcher, list[int]()
    inner = dispatcher.route

    def route(*arguments: Any) -> Route:
        gathered = [len(v) for (kind, _), v in traffic.operands.items() if kind == "all_gather"]
        seen.append(sum(gathered))
        return inner(*arguments)

    dispatcher.route = route  # type: ignore[assignment, method-assign]
    with Traffic() as traffic, torch.no_grad():
        setup.model(batch.tokens, batch.labels, batch.layout)
    return seen


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # The root, the layer and the one behind it.
        (Case(shard=2), [3, 3]),
        (Case(shard=2, reshard=True), [3, 3]),
        # Experts over two more ranks are a unit of their own.
        (Case(shard=4, expert=2), [5, 5]),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_the_next_layers_weights_are_gathered_before_the_host_waits(
    case: Case, expected: list[int]
) -> None:
    assert run_ranks(gathers_before_each_route, case.world, case) == [expected] * case.world


def struck_in_the_third_step(folder: Path) -> None:
    setup = Setup.of(Case(replicate=2))
    reduce, calls = step._reduce, list[int]()

    def then_strike(loss: Tensor, load: Tensor, stop: int) -> tuple[Tensor, Tensor, int]:
        calls.append(1)
        if len(calls) == 3:
            Fault(1, SCALE, 0.0).strike(setup)
        return reduce(loss, load, stop)

    step._reduce = then_strike  # type: ignore[assignment]
    run = phase_run(setup, folder, [], [0])
    run_phase(run, Steps(setup.batches(0)), TrainState())


def test_a_gradient_that_differs_is_told_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(struck_in_the_third_step, 2, tmp_path)
    told = re.findall(r"NumericsError: (step \d+): replicas disagree", str(caught.value))
    assert set(told) == {"step 3"}
