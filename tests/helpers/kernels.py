"""Comparing an operation's back ends, outputs and every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    Run = Callable[[str, Mapping[str, Tensor]], Sequence[Tensor]]


FEW = 16


@dataclass(frozen=True)
class Passed:
    """What one forward and backward gave."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run_pass(run: Run, backend: str, inputs: Mapping[str, Tensor]) -> Passed:
    """Forward, and backward of a fixed random projection of the outputs."""
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in inputs.items()}
    outputs = list(run(backend, leaves))
    weights = [random(*out.shape, seed=100 + i) for i, out in enumerate(outputs)]
    total = sum(
        ((out * weight.to(out.dtype)).sum() for out, weight in zip(outputs, weights, strict=True)),
        start=torch.zeros((), dtype=outputs[0].dtype),
    )
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=False)
    return Passed([out.detach() for out in outputs], dict(zip(leaves, gradients, strict=True)))


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected (or 1e-3, for zeros)."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all(), "not finite: NaN, or memory never written"
    gap = (found.double() - expected.double()).norm()
    return float(gap / expected.double().norm().clamp_min(1e-3))


def assert_close(found: Passed, expected: Passed, tolerance: float) -> None:
    errors = {
        f"output {i}": error(a, b)
        for i, (a, b) in enumerate(zip(found.outputs, expected.outputs, strict=True))
    }
    assert found.gradients.keys() == expected.gradients.keys()
    errors |= {name: error(g, expected.gradients[name]) for name, g in found.gradients.items()}
    assert {name: e for name, e in errors.items() if not e <= tolerance} == {}


def assert_backends_agree(run: Run, inputs: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Eager against reference on the inputs as they are."""
    expected = run_pass(run, "reference", inputs)
    assert_close(run_pass(run, "eager", inputs), expected, tolerance)


def assert_low_precision(
    run: Run, inputs: Mapping[str, Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    """Eager on inputs rounded to `dtype` against the fp64 reference on the same rounded values."""
    rounded = {name: value.to(dtype) for name, value in inputs.items()}
    exact = run_pass(run, "reference", {name: value.double() for name, value in rounded.items()})
    assert_close(run_pass(run, "eager", rounded), exact, tolerance)


def assert_no_worse(
    run: Run, inputs: Mapping[str, Tensor], backend: str, slack: float = 1.1
) -> dict[str, float]:
    """Errors of `backend` against float64 are at most those of eager torch on the same inputs.

    `slack` and an eighth of a rounding step (half a one in fp32, where whole errors are one or two
    steps and libraries choose the order of sums) leave room for chance: both back ends round
    equally often, but not the same intermediate values. A tensor of a few numbers is all chance, so
    it may err by four steps. Returns the ratios.
    """
    exact = run_pass(run, "reference", {name: value.double() for name, value in inputs.items()})
    found, usual = run_pass(run, backend, inputs), run_pass(run, "eager", inputs)
    pairs = {f"output {i}": i for i in range(len(exact.outputs))}
    worse, ratios = {}, {}
    for name in [*pairs, *exact.gradients]:
        values = [
            passed.outputs[pairs[name]] if name in pairs else passed.gradients[name]
            for passed in (found, usual, exact)
        ]
        assert values[0].dtype == values[1].dtype, name
        mine, theirs = error(values[0], values[2]), error(values[1], values[2])
        ratios[name] = mine / max(theirs, 1e-30)
        chance = 1 / 2 if values[0].dtype == torch.float32 else 1 / 8
        steps = chance if values[0].numel() > FEW else 4
        if mine > slack * theirs + steps * torch.finfo(values[0].dtype).eps:
            worse[name] = (mine, theirs)
    assert worse == {}
    return ratios


def assert_bitwise(run: Run, inputs: Mapping[str, Tensor], backend: str) -> None:
    """Two runs give the same bits."""
    first, second = (run_pass(run, backend, inputs) for _ in range(2))
    for a, b in zip(first.outputs, second.outputs, strict=True):
        assert torch.equal(a, b)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name
