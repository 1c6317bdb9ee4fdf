"""The Triton router gives the same bits whichever program runs first; `zaya kernels verify` says so
of every operation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from ..helpers.kernels import run_pass
from .test_router import call, context_of, inputs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

pytest.importorskip("triton", reason="the extra `triton` is not installed")

import triton
import triton.language as tl
from zaya_kernels.workshop.order import programs_reversed

from .test_triton_router import HIDDEN, WIDTH, small_blocks

__all__ = ["small_blocks"]
pytestmark = pytest.mark.usefixtures("interpreter")


@triton.jit
def total_by_atomics(x, out):
    tl.atomic_add(out, tl.load(x + tl.program_id(0)))


def test_a_sum_by_atomics_depends_on_the_order() -> None:
    """So the test below can fail: in fp32 1e8 + 1 - 1e8 is 0 or 1."""

    def total() -> float:
        out = torch.zeros(1)
        total_by_atomics[(3,)](torch.tensor([1.0, 1e8, -1e8]), out)
        return float(out)

    assert total() == 0.0
    with programs_reversed():
        assert total() == 1.0
    assert total() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["chooses", "given choice"])
@pytest.mark.parametrize("first", [False, True], ids=["later layer", "first layer"])
def test_every_path_of_the_router(first: bool, given: bool, dtype: torch.dtype) -> None:
    inputs, context = inputs_of((1, 37), dtype, first, WIDTH, HIDDEN), context_of((1, 37))
    if given:
        routed = call("eager", inputs, context)
        context = replace(context, choice=routed.choice, load=routed.load)

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        routed = call(backend, x, context)
        # Not differentiable, but part of what must agree.
        extra = torch.cat([routed.choice.flatten().float(), routed.load])
        return [routed.probability, routed.state, extra + 0 * routed.probability.sum()]

    usual = run_pass(run, "triton", inputs)
    with programs_reversed():
        other = run_pass(run, "triton", inputs)
    for a, b in zip(usual.outputs, other.outputs, strict=True):
        assert torch.equal(a, b)
    for name, gradient in usual.gradients.items():
        assert torch.equal(gradient, other.gradients[name]), name
