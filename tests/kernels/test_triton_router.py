"""Triton router, interpreted, against float64 and against eager torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.launch import INTERPRETED

from ..helpers.kernels import assert_bitwise, assert_no_worse
from .test_router import CLASSES, call, context_of, inputs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.router import triton as host
from zaya_kernels.workshop.interpreter import counting

pytestmark = pytest.mark.usefixtures("interpreter")

SLACK = 2.0
"""Vectors of 32 sums over few tokens, added in other orders: their errors differ by chance."""

WIDTH, HIDDEN = 32, 48


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks each way."""
    small = {"BM": 32, "BN": 16, "BK": 16, "BT": 16}
    for name, table in host.CONFIGS.items():
        kept = {key: small[key] for key in table[INTERPRETED].blocks}
        if "BT" in kept:
            kept["BM"] = 16
        config = replace(table[INTERPRETED], blocks=kept)
        monkeypatch.setitem(host.CONFIGS, name, {**table, INTERPRETED: config})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("first", [True, False])
def test_as_exact_as_eager(tokens: int, dtype: torch.dtype, first: bool) -> None:
    inputs = inputs_of((1, tokens), dtype, first, WIDTH, HIDDEN)
    # The choice of float64: of two classes almost alike either may be right.
    exact = call("reference", {n: x.double() for n, x in inputs.items()}, context_of((1, tokens)))
    context = replace(context_of((1, tokens)), choice=exact.choice, load=exact.load)

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        routed = call(backend, x, context)
        return [routed.probability, routed.state]

    assert_no_worse(run, inputs, "triton", SLACK)


def test_choice_and_load_are_eagers() -> None:
    shape = (3, 23)
    inputs, context = inputs_of(shape, torch.float32, False, WIDTH, HIDDEN), context_of(shape)
    inputs["out"] = 4 * inputs["out"] - 4 * inputs["out"].mean(dim=1, keepdim=True)
    found, usual = (call(backend, inputs, context) for backend in ("triton", "eager"))
    assert torch.equal(found.choice, usual.choice) and found.choice.dtype == torch.int64
    assert torch.equal(found.load, usual.load) and found.load.dtype == torch.float32
    assert len(set(found.choice.flatten().tolist())) > 1
    moved = replace(context, balancing=context.balancing + 100 * torch.eye(CLASSES)[2])
    assert set(call("triton", inputs, moved).choice.flatten().tolist()) == {2}


def test_the_first_of_equal_classes_is_chosen() -> None:
    inputs = inputs_of((1, 4), torch.float32, True, WIDTH, HIDDEN)
    inputs["out"] = torch.zeros_like(inputs["out"])
    context = replace(context_of((1, 4)), balancing=torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]))
    assert call("triton", inputs, context).choice.tolist() == [[1, 1, 1, 1]]


def test_a_given_choice_is_kept() -> None:
    inputs, context = inputs_of((1, 20), torch.float32, False, WIDTH, HIDDEN), context_of((1, 20))
    choice = torch.arange(20).view(1, 20) % CLASSES
    load = torch.full((CLASSES,), 7.0)
    routed = call("triton", inputs, replace(context, choice=choice, load=load))
    assert torch.equal(routed.choice, choice) and torch.equal(routed.load, load)
    expected = call("eager", inputs, replace(context, choice=choice, load=load))
    torch.testing.assert_close(routed.probability, expected.probability)


def test_two_runs_agree_bitwise() -> None:
    inputs, context = inputs_of((1, 37), torch.bfloat16, False, WIDTH, HIDDEN), context_of((1, 37))

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        routed = call(backend, x, context)
        # Not differentiable, but part of what must agree.
        extra = torch.cat([routed.choice.flatten().float(), routed.load])
        return [routed.probability, routed.state, extra + 0 * routed.probability.sum()]

    assert_bitwise(run, inputs, "triton")


@pytest.mark.parametrize("used", [0, 1])
def test_one_unused_output_has_no_part_in_the_gradient(used: int) -> None:
    inputs, context = inputs_of((1, 20), torch.float32, False, WIDTH, HIDDEN), context_of((1, 20))
    names = ("down", "down_bias", "depth_scale", "x", "previous")
    fixed = {} if used == 0 else {n: x for n, x in inputs.items() if n not in names}
    leaves = {n: x for n, x in inputs.items() if n not in fixed}

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        routed = call(backend, {**{n: v.to(x["x"].dtype) for n, v in fixed.items()}, **x}, context)
        return [(routed.probability, routed.state)[used]]

    assert_no_worse(run, leaves, "triton", SLACK)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    for width, hidden in ((24, 48), (8, 48), (32, 40)):
        inputs = inputs_of((1, 4), torch.float32, True, width, hidden)
        with pytest.raises(ValueError, match=r"kernels\.router: triton takes widths"):
            call("triton", inputs, context_of((1, 4)))
    inputs = inputs_of((1, 4), torch.float32, True, 32, 48)
    with pytest.raises(ValueError, match=r"kernels\.router: triton takes one type"):
        call("triton", {**inputs, "fc1": inputs["fc1"].bfloat16()}, context_of((1, 4)))
    with pytest.raises(ValueError, match=r"kernels\.router: triton takes one token or more"):
        call("triton", inputs_of((1, 0), torch.float32, True, 32, 48), context_of((1, 0)))


def test_traffic_is_what_the_kernels_move() -> None:
    inputs, context = inputs_of((1, 37), torch.bfloat16, False, WIDTH, HIDDEN), context_of((1, 37))
    with torch.no_grad(), counting() as counts:
        call("triton", inputs, context)
    moved, fewest = host.traffic(37, (HIDDEN, WIDTH, CLASSES), INTERPRETED)
    assert len(counts) == 3
    assert sum(launch.distinct_bytes for launch in counts) == moved
    assert fewest < moved


def test_traffic_of_the_forward_at_the_shipped_shape() -> None:
    moved, fewest = host.traffic(32_768, (2048, 256, 17), INTERPRETED)
    assert moved <= 1.7 * fewest
