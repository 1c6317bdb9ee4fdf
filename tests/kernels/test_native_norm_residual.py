"""Residual scaling and RMSNorm in C against float64 and against eager torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from zaya_kernels.backends import RANGE, named_in_profiles
from zaya_kernels.norm_residual.op import (
    ResidualScales,
    residual,
    residual_norm,
    rms_norm,
    stream_norm,
)

from ..helpers.kernels import assert_bitwise, assert_no_worse, random, run_pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..helpers.kernels import Run

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# One row; a width below a vector's; odd ends of vectors, spans and parts of the rows.
SHAPES = [(1, 1, 70), (2, 3, 7), (2, 7, 100), (3, 401, 48)]
SCALES = tuple(ResidualScales.__dataclass_fields__)


def inputs_of(
    shape: tuple[int, ...], dtype: torch.dtype, names: Sequence[str] = (), stream: str = "float32"
) -> dict[str, Tensor]:
    made = {"stream": random(*shape, seed=1, dtype=getattr(torch, stream))}
    made["branch"] = random(*shape, seed=2, dtype=dtype)
    vectors = (*SCALES, "weight")
    made |= {name: random(shape[-1], seed=3 + i, dtype=dtype) for i, name in enumerate(vectors)}
    return {name: value for name, value in made.items() if not names or name in names}


def fused(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    scales = ResidualScales(*(x[name] for name in SCALES))
    return residual_norm(x["stream"], x["branch"], scales, x["weight"], 1e-5, backend)


def add(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    scales = ResidualScales(*(x[name] for name in SCALES))
    return [residual(x["stream"], x["branch"], scales, backend)]


def norm(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return [rms_norm(x["stream"], x["weight"], 1e-5, backend)]


def beside(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return stream_norm(x["stream"], x["weight"], 1e-5, backend)


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_is_as_exact_as_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_no_worse(fused, inputs_of(shape, dtype), "native")


@TYPES
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_either_half_is_as_exact_as_eager(stream: str, dtype: torch.dtype) -> None:
    """The stream of the other type too, which no specialised loop takes."""
    for run, names in ((add, ("stream", "branch", *SCALES)), (norm, ("stream", "weight"))):
        for shape in SHAPES[1:]:
            assert_no_worse(run, inputs_of(shape, dtype, names, stream), "native")


def test_a_stream_and_its_norm_give_one_gradient() -> None:
    inputs = inputs_of(SHAPES[2], torch.bfloat16, ("stream", "weight"))
    assert_no_worse(beside, inputs, "native")
    assert beside("native", inputs)[0].data_ptr() == inputs["stream"].data_ptr()


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("run", [fused, beside])
def test_one_unused_output_has_no_part_in_the_gradient(run: Run, used: int) -> None:
    inputs = inputs_of(SHAPES[2], torch.bfloat16)
    if run is beside:
        inputs = {name: inputs[name] for name in ("stream", "weight")}
    weight = inputs["weight"]
    if used == 0:
        del inputs["weight"]

    def one(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [run(backend, {"weight": weight.to(next(iter(x.values()))), **x})[used]]

    assert_no_worse(one, inputs, "native")


def test_weights_of_another_type_than_the_branch() -> None:
    inputs = inputs_of(SHAPES[2], torch.bfloat16)
    inputs["weight"] = inputs["weight"].float()
    assert_no_worse(fused, inputs, "native")
    assert fused("native", inputs)[1].dtype == torch.float32


@TYPES
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    def by_threads(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        torch.set_num_threads(threads.pop())
        return fused(name, x)

    threads = [1, 2]
    assert_bitwise(by_threads, inputs_of(SHAPES[3], dtype), "native")


def test_zeros_stay_finite_and_no_rows_are_no_error() -> None:
    inputs = {name: torch.zeros_like(x) for name, x in inputs_of(SHAPES[1], torch.float32).items()}
    assert_no_worse(fused, inputs, "native")
    none = run_pass(fused, "native", inputs_of((2, 0, 8), torch.float32))
    assert none.outputs[1].shape == (2, 0, 8)
    assert float(none.gradients["weight"].abs().sum()) == 0.0


def test_strided_rows_are_read_by_their_strides() -> None:
    inputs = inputs_of((2, 8, 32), torch.bfloat16)
    turned = {name: x.mT.contiguous().mT if x.dim() == 3 else x for name, x in inputs.items()}
    straight, strided = fused("native", inputs), fused("native", turned)
    assert all(torch.equal(a, b) for a, b in zip(straight, strided, strict=True))
    assert_no_worse(beside, {name: turned[name] for name in ("stream", "weight")}, "native")
    # Gradients, too: those of a transposed use.
    names = ("stream", "weight")
    assert_no_worse(
        lambda b, x: [out.mT.contiguous() for out in beside(b, x)],
        inputs_of((2, 8, 32), torch.bfloat16, names),
        "native",
    )


def test_an_unused_norms_weight_has_no_gradient() -> None:
    leaves = [x.requires_grad_(True) for x in inputs_of(SHAPES[1], torch.float32).values()]
    out, _ = fused(
        "native", dict(zip(("stream", "branch", *SCALES, "weight"), leaves, strict=True))
    )
    grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    assert [grad is None for grad in grads] == [False] * 6 + [True]


def test_fused_forms_are_named_in_profiles() -> None:
    inputs = inputs_of(SHAPES[1], torch.float32)
    with named_in_profiles(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        fused("native", inputs)
        beside("native", inputs)
    ranges = [event.name for event in recorded.events() if event.name.startswith(RANGE)]
    assert ranges == ["zaya::norm_residual"] * 2


def test_fp64_is_refused() -> None:
    inputs = {name: value.double() for name, value in inputs_of(SHAPES[0], torch.float32).items()}
    with pytest.raises(ValueError, match=r"kernels\.norm_residual: native takes .* not float64"):
        fused("native", inputs)


def test_rehearsals_count_memory_without_computing() -> None:
    with FakeTensorMode():
        stream, weight = torch.zeros(6, 8, requires_grad=True), torch.zeros(8, requires_grad=True)
        kept, normed = stream_norm(stream, weight, 1e-5, "native")
        gradients = torch.autograd.grad((kept + normed).sum(), [stream, weight])
    assert [g.shape for g in gradients] == [stream.shape, weight.shape]
