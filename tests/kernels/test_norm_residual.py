from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.norm_residual.op import ResidualScales, residual, rms_norm

from ..helpers.kernels import (
    assert_backends_agree,
    assert_close,
    assert_low_precision,
    random,
    run_pass,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

SHAPES = [(2, 3, 17), (1, 1, 1), (1, 5, 64)]


def residual_inputs(shape: tuple[int, int, int]) -> dict[str, Tensor]:
    names = ("stream_scale", "stream_bias", "branch_scale", "branch_bias")
    inputs = {"stream": random(*shape, seed=1), "branch": random(*shape, seed=2)}
    return inputs | {name: random(shape[-1], seed=3 + i) for i, name in enumerate(names)}


def add(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    scales = ResidualScales(**{name: x[name] for name in ResidualScales.__dataclass_fields__})
    return [residual(x["stream"], x["branch"], scales, backend)]


def norm(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return [rms_norm(x["x"], x["weight"], 1e-5, backend)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_eager_equals_reference(shape: tuple[int, int, int]) -> None:
    assert_backends_agree(add, residual_inputs(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
def test_norm_eager_equals_reference(shape: tuple[int, int, int], size: float) -> None:
    inputs = {"x": random(*shape, seed=1) * size, "weight": random(shape[-1], seed=2)}
    assert_backends_agree(norm, inputs)


def test_norm_of_zeros_is_zero_with_a_finite_gradient() -> None:
    inputs = {"x": torch.zeros(2, 3, 8, dtype=torch.float64), "weight": random(8, seed=2)}
    assert_backends_agree(norm, inputs)


def test_gradients_agree_with_finite_differences() -> None:
    inputs = residual_inputs((2, 2, 5))
    leaves = {name: value.requires_grad_(True) for name, value in inputs.items()}
    assert torch.autograd.gradcheck(
        lambda *values: add("eager", dict(zip(leaves, values, strict=True)))[0],
        tuple(leaves.values()),
    )
    x, weight = random(2, 3, 5, seed=1), random(5, seed=2)
    assert torch.autograd.gradcheck(
        lambda x, weight: rms_norm(x, weight, 1e-5, "eager"),
        (x.requires_grad_(True), weight.requires_grad_(True)),
    )


def test_bf16_keeps_bf16_accuracy() -> None:
    inputs = {"x": random(4, 16, 64, seed=1), "weight": random(64, seed=2)}
    assert_low_precision(norm, inputs, torch.bfloat16, 2**-7)
    assert_low_precision(add, residual_inputs((4, 16, 64)), torch.bfloat16, 2**-7)


def test_the_stream_stays_fp32_beside_a_bf16_branch() -> None:
    inputs = residual_inputs((2, 3, 64))
    mixed = {k: v.to(torch.float32 if k == "stream" else torch.bfloat16) for k, v in inputs.items()}
    found = run_pass(add, "eager", mixed)
    assert found.outputs[0].dtype == torch.float32
    assert {name: grad.dtype for name, grad in found.gradients.items()} == {
        name: value.dtype for name, value in mixed.items()
    }
    exact = run_pass(add, "reference", {name: value.double() for name, value in mixed.items()})
    assert_close(found, exact, 2**-8)
    torch.testing.assert_close(found.outputs[0].double(), exact.outputs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_norm_returns_the_weights_dtype(backend: str) -> None:
    x, weight = random(3, 8, seed=1).float(), random(8, seed=2).bfloat16()
    assert rms_norm(x, weight, 1e-5, backend).dtype == torch.bfloat16
