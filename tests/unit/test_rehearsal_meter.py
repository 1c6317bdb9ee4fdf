"""What the meter refuses to count."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol

from zaya_train.config.errors import ConfigError
from zaya_train.optim.shards import Shard
from zaya_train.tools.rehearsal import _alone
from zaya_train.tools.rehearsal_meter import Meter, UncountedError
from zaya_train.train.step import _reduce, global_norm

if TYPE_CHECKING:
    from collections.abc import Callable


def functional() -> None:
    group = dist.group.WORLD
    assert group is not None
    funcol.all_reduce(torch.ones(3), "sum", group)


def broadcast() -> None:
    dist.broadcast(torch.ones(3), 0)


def barrier() -> None:
    dist.barrier()


@torch.library.custom_op("elsewhere::send", mutates_args=())
def send(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def custom() -> None:
    send(torch.ones(3))


def counted() -> None:
    dist.all_reduce(torch.ones(3))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (functional, r"_c10d_functional\.all_reduce"),
        (broadcast, r"c10d\.broadcast_"),
        (barrier, r"c10d\.barrier"),
        (custom, r"elsewhere\.send"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_operators_that_may_communicate_uncounted_are_refused(
    call: Callable[[], None], name: str
) -> None:
    rule = rf"{name}.*: a rehearsal counts no such operator, it might communicate; known are "
    with (
        _alone(8),
        Meter({"0": "world"}, {}).counting(),
        pytest.raises(UncountedError, match=rule),
    ):
        call()


def test_a_refusal_is_told_across_processes() -> None:
    error = UncountedError.of("elsewhere.send", ("aten", "c10d"))
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ConfigError) and str(again) == str(error)


def test_what_follows_the_backward_pass_is_the_optimizer_stage() -> None:
    parameter = torch.nn.Parameter(torch.ones(1000))
    parameter.grad = torch.ones(1000)
    losses, load = torch.ones(2), torch.ones(2, 3)
    meter = Meter({"0": "world"}, {})
    with _alone(1), meter.counting():
        norm = global_norm([Shard.of("weight", parameter)], 1)
        _reduce(losses, load, 0)
    assert norm == pytest.approx(1000**0.5)
    assert set(meter.peaks) == {"optimizer"}
    assert meter.peaks["optimizer"].components["optimizer step"] >= 8 * 1000


def test_known_ones_are_counted() -> None:
    with _alone(8):
        assert dist.group.WORLD is not None
        meter = Meter({dist.group.WORLD.group_name: "world"}, {})
        with meter.counting():
            counted()
    flow = meter.flows["all_reduce", "world"]
    assert (flow.calls, flow.bytes) == (1, 12)
