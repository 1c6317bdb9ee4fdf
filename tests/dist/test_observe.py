"""What a logged step records, against a model that is looked into by hand, on several layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.dist.harness import Case, Setup
from tests.helpers.distributed import run_ranks
from zaya_train.optim.shards import Shard
from zaya_train.parallel.fsdp import local_row_start
from zaya_train.train.observe import observations, watched
from zaya_train.train.step import pass_over
from zaya_train.train.trace import Recorder

Row = dict[str, Any]
ONE = Case(micro_rows=4, layers=3)  # the micro-batch that is looked at holds the whole step


def set_gains(setup: Setup) -> None:
    """Channel c of layer l gets l + c / 10, on any number of ranks."""
    for number in range(1, len(setup.model.layers)):
        scale = setup.model.get_parameter(f"layers.{number}.moe.router.depth_scale")
        local = Shard.of("", scale).local
        first = local_row_start(scale) if isinstance(scale, DTensor) else 0
        local.copy_(number + torch.arange(first, first + len(local)) / 10)


def observed(case: Case) -> tuple[Row, list[list[float]]]:
    """The row's fields after one step, and the biases as the layers hold them."""
    setup = Setup.of(case)
    with watched(setup.model, True) as watch:
        setup.step(0)
    assert watch is not None
    set_gains(setup)
    row = observations(watch, setup.optimizer, setup.reduction.replicas, 100 + dist.get_rank())
    names = [f"layers.{n}.moe.router.balancing_bias" for n in range(len(setup.model.layers))]
    return row, [setup.model.get_buffer(name).tolist() for name in names]


def stream_by_hand(case: Case) -> list[float]:
    """Root mean squares at layer borders over the first micro-batch's valid tokens, one rank."""
    setup = Setup.of(case)
    seen: list[torch.Tensor] = []
    for layer in setup.model.layers:
        layer.register_forward_pre_hook(lambda layer, given: seen.append(given[0].detach()))
    setup.model.layers[-1].register_forward_hook(
        lambda layer, given, made: seen.append(made[0].detach())
    )
    batch = setup.batches(0)[0]
    setup.model(batch.tokens, batch.labels, batch.layout)
    valid = batch.layout.valid
    return [float(stream[valid].double().square().mean().sqrt()) for stream in seen]


@pytest.mark.parametrize("case", [ONE, replace(ONE, micro_rows=1)], ids=lambda case: case.name)
def test_one_rank_tells_what_the_model_holds(case: Case) -> None:
    ((row, biases),) = run_ranks(observed, 1, case)
    (by_hand,) = run_ranks(stream_by_hand, 1, case)
    assert row["stream_rms"] == pytest.approx(by_hand, rel=1e-6)
    assert row["eda_gain"] == pytest.approx([1.35, 2.35])  # router_size 8: l + 3.5 / 10
    assert row["balancing_bias"] == [[round(x, 5) for x in layer] for layer in biases]
    assert any(x for layer in row["balancing_bias"] for x in layer)
    assert row["memory_bytes_ranks"] == [100, 100]


@pytest.mark.parametrize(
    "case",
    [replace(ONE, shard=2, micro_rows=2), replace(ONE, replicate=2, micro_rows=2),
     replace(ONE, context=2), replace(ONE, context=2, recompute="full")],
    ids=lambda case: case.name,
)  # fmt: skip
def test_two_ranks_tell_what_one_tells(case: Case) -> None:
    ((alone, _),) = run_ranks(observed, 1, ONE)
    rows = [row for row, _ in run_ranks(observed, 2, case)]
    assert rows[0] == rows[1]
    assert rows[0]["stream_rms"] == pytest.approx(alone["stream_rms"], rel=1e-5)
    assert rows[0]["eda_gain"] == pytest.approx(alone["eda_gain"], rel=1e-5)
    assert rows[0]["memory_bytes_ranks"] == [100, 101]


def sampled(case: Case) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What a recorder keeps of one step, and what the routers chose in its first micro-batch."""
    setup = Setup.of(case)
    controller = setup.optimizer.balancing
    chosen: list[torch.Tensor] = []
    first = setup.batches(0)[0]
    recorder = Recorder(setup.model, controller, tokens=10_000)
    for layer in setup.model.layers:
        router = layer.get_submodule("moe.router")
        router.register_forward_hook(lambda _, given, made: chosen.append(made.choice.flatten()))
    result = setup.step(0)
    recorder.close()
    valid = first.layout.valid.flatten()
    return recorder.arrays(result), [choice[valid] for choice in chosen[: case.layers]]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_trace_samples_the_first_micro_batch_alone(recompute: str) -> None:
    # Four micro-batches; recomputation sends each through the routers twice.
    case = replace(ONE, micro_rows=1, recompute=recompute)
    ((arrays, first),) = run_ranks(sampled, 1, case)
    assert arrays["choice"].tolist() == [choice.tolist() for choice in first]
    assert arrays["probabilities"].shape == (3, len(first[0]), 5)
    biased = arrays["probabilities"] + arrays["bias"][:, None, :]
    assert (biased.argmax(axis=2) == arrays["choice"]).all()
    # The counts are of all four.
    assert (arrays["counts"].sum(axis=1) > 2 * len(first[0])).all()


def hooks_left() -> tuple[int, int, list[float]]:
    setup = Setup.of(ONE)
    before = sum(len(layer._forward_hooks) for layer in setup.model.layers)
    with watched(setup.model, True) as watch:
        pass_over(setup.optimizer, setup.batches(0))
    assert watch is not None
    row = observations(watch, setup.optimizer, setup.reduction.replicas, 0)
    with watched(setup.model, False) as unwatched:
        assert unwatched is None
    after = sum(len(layer._forward_hooks) for layer in setup.model.layers)
    return before, after, row["stream_rms"]


def test_rows_passed_over_have_no_stream_and_leave_no_hook() -> None:
    ((before, after, stream),) = run_ranks(hooks_left, 1)
    assert before == after
    assert len(stream) == 4 and all(value != value for value in stream)
