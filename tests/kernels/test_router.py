"""Eager router against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.router.op import Routed, RouterContext, RouterWeights, router

from ..helpers.kernels import assert_backends_agree, random

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

CLASSES = 5


def inputs_of(
    shape: tuple[int, int], dtype: torch.dtype, first: bool, width: int = 8, hidden: int = 12
) -> dict[str, Tensor]:
    """Named inputs; a first layer has no earlier state."""
    shapes = {
        "x": (*shape, hidden),
        "previous": (*shape, width),
        "down": (width, hidden),
        "down_bias": (width,),
        "depth_scale": (width,),
        "norm": (width,),
        "fc1": (width, width),
        "fc1_bias": (width,),
        "fc2": (width, width),
        "fc2_bias": (width,),
        "out": (CLASSES, width),
    }
    if first:
        del shapes["previous"], shapes["depth_scale"]
    scale = {name: s[-1] ** -0.5 if len(s) == 2 else 1.0 for name, s in shapes.items()}
    made = {name: random(*s, seed=i) * scale[name] for i, (name, s) in enumerate(shapes.items())}
    return {name: value.to(dtype) for name, value in made.items()}


def context_of(shape: tuple[int, int]) -> RouterContext:
    generator = torch.Generator().manual_seed(5)
    valid = torch.rand(shape, generator=generator) < 0.8
    balancing = 0.1 * torch.randn(CLASSES, generator=generator)
    return RouterContext(balancing, valid, 1e-5)


def call(backend: str, x: Mapping[str, Tensor], context: RouterContext) -> Routed:
    names = RouterWeights.__dataclass_fields__
    weights = RouterWeights(**{name: x.get(name) for name in names})  # type: ignore[arg-type]
    previous = x.get("previous")
    if previous is not None and previous.dtype == torch.bfloat16:
        previous = previous.float()
    return router(x["x"], previous, weights, context, backend)


@pytest.mark.parametrize("first", [True, False])
def test_eager_equals_reference(first: bool) -> None:
    context = context_of((2, 9))

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        routed = call(backend, x, context)
        return [routed.probability, routed.state]

    inputs = inputs_of((2, 9), torch.float64, first)
    assert_backends_agree(run, inputs)
    eager, reference = (call(backend, inputs, context) for backend in ("eager", "reference"))
    assert torch.equal(eager.choice, reference.choice)
    assert torch.equal(eager.load, reference.load)
    counted = torch.bincount(eager.choice[context.valid], minlength=CLASSES)
    assert eager.load.tolist() == counted.tolist()


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_the_bias_moves_the_choice_and_not_the_probability(backend: str) -> None:
    inputs, context = inputs_of((1, 6), torch.float64, True), context_of((1, 6))
    free = call(backend, inputs, replace(context, balancing=torch.zeros(CLASSES)))
    forced = call(backend, inputs, replace(context, balancing=100 * torch.eye(CLASSES)[3]))
    assert set(forced.choice.flatten().tolist()) == {3}
    assert bool((forced.probability <= free.probability).all())
    assert float(forced.probability.max()) < 1


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_given_choice_is_kept(backend: str) -> None:
    inputs, context = inputs_of((1, 6), torch.float64, False), context_of((1, 6))
    choice, load = torch.tensor([[0, 1, 2, 3, 4, 0]]), torch.full((CLASSES,), 9.0)
    routed = call(backend, inputs, replace(context, choice=choice, load=load))
    assert torch.equal(routed.choice, choice) and torch.equal(routed.load, load)
