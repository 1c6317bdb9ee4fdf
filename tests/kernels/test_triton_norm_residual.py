"""Triton residual scaling and RMSNorm, interpreted, against float64 and against eager torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.launch import ARCHITECTURES, INTERPRETED
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

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.norm_residual.triton import CONFIGS, layer_bytes, traffic
from zaya_kernels.workshop.interpreter import counting

pytestmark = pytest.mark.usefixtures("interpreter")

SHAPES = [(1, 1, 64), (2, 7, 100), (1, 33, 256)]


def inputs_of(
    shape: tuple[int, int, int], dtype: torch.dtype, names: Sequence[str] = ()
) -> dict[str, Tensor]:
    vectors = (*ResidualScales.__dataclass_fields__, "weight")
    made = {"stream": random(*shape, seed=1, dtype=torch.float32)}
    made["branch"] = random(*shape, seed=2, dtype=dtype)
    made |= {name: random(shape[-1], seed=3 + i, dtype=dtype) for i, name in enumerate(vectors)}
    return {name: value for name, value in made.items() if not names or name in names}


def scales_of(x: Mapping[str, Tensor]) -> ResidualScales:
    return ResidualScales(**{name: x[name] for name in ResidualScales.__dataclass_fields__})


def fused(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return residual_norm(x["stream"], x["branch"], scales_of(x), x["weight"], 1e-5, backend)


def add(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return [residual(x["stream"], x["branch"], scales_of(x), backend)]


def norm(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return [rms_norm(x["stream"], x["weight"], 1e-5, backend)]


def beside(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return stream_norm(x["stream"], x["weight"], 1e-5, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_is_as_exact_as_eager(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_no_worse(fused, inputs_of(shape, dtype), "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_either_half_is_as_exact_as_eager(dtype: torch.dtype) -> None:
    names = ("stream", "branch", *ResidualScales.__dataclass_fields__)
    assert_no_worse(add, inputs_of(SHAPES[1], dtype, names), "triton")
    assert_no_worse(norm, inputs_of(SHAPES[1], dtype, ("stream", "weight")), "triton")


def test_a_stream_and_its_norm_give_one_gradient() -> None:
    inputs = inputs_of(SHAPES[1], torch.bfloat16, ("stream", "weight"))
    assert_no_worse(beside, inputs, "triton")
    assert beside("triton", inputs)[0].data_ptr() == inputs["stream"].data_ptr()


def moved_by(run: Run) -> tuple[int, int]:
    """Bytes that a pass's kernels move per element; so many rows that vectors come to less than
    one."""
    rows, columns = 320, 64
    inputs = inputs_of((1, rows, columns), torch.bfloat16)
    with counting() as counts:
        outputs = run("triton", {n: x.requires_grad_(True) for n, x in inputs.items()})
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    forward, backward = (count.distinct_bytes // (rows * columns) for count in counts)
    return forward, backward


@pytest.mark.parametrize("backward", [False, True])
def test_a_layers_bytes_are_those_of_its_operations(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide_blocks(monkeypatch, 32)
    together = sum(moved_by(run)[backward] for run in (beside, fused, add))
    assert together == layer_bytes(True, backward)
    alone = sum(moved_by(run)[backward] for run in (norm, add))
    # Autograd reads both gradients of the stream and writes their sum.
    assert 2 * (alone + 12 * backward) == layer_bytes(False, backward)


def wide_blocks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for table in CONFIGS.values():
        wider = replace(table[INTERPRETED], blocks={"R": rows})
        monkeypatch.setitem(table, INTERPRETED, wider)


def test_blocks_of_several_rows_end_inside_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_blocks(monkeypatch, 4)
    assert_no_worse(fused, inputs_of(SHAPES[2], torch.bfloat16), "triton")


@pytest.mark.parametrize("backward", [False, True])
def test_traffic_is_what_the_kernels_move(backward: bool) -> None:
    inputs = inputs_of((1, 33, 256), torch.bfloat16)
    with counting() as counts:
        run_pass(fused, "triton", inputs)
    programs = counts[1].programs
    moved, fewest = traffic(33, 256, INTERPRETED, backward)
    # The sums over programs are read again by torch, which the interpreter does not see.
    afterwards = 4 * programs * 256 * 4 if backward else 0
    # The backward does not read the weight's and the biases' gradients.
    assert counts[backward].distinct_bytes == moved - afterwards
    assert moved > fewest


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_traffic_is_near_the_fewest_possible(arch: str) -> None:
    for backward in (False, True):
        moved, fewest = traffic(32768, 2048, arch, backward)
        assert moved <= 1.1 * fewest


def test_two_runs_agree_bitwise() -> None:
    assert_bitwise(fused, inputs_of(SHAPES[1], torch.bfloat16), "triton")


@pytest.mark.parametrize("used", [0, 1])
def test_one_unused_output_has_no_part_in_the_gradient(used: int) -> None:
    def one(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [fused(backend, x)[used]]

    inputs = inputs_of(SHAPES[1], torch.bfloat16)
    if used == 0:
        weight = inputs.pop("weight")
        assert_no_worse(
            lambda b, x: one(b, {**x, "weight": weight.to(x["branch"])}), inputs, "triton"
        )
    else:
        assert_no_worse(one, inputs, "triton")


def test_zeros_stay_finite() -> None:
    inputs = {name: torch.zeros_like(x) for name, x in inputs_of(SHAPES[1], torch.float32).items()}
    assert_no_worse(fused, inputs, "triton")


def test_a_non_contiguous_stream_is_read_by_its_strides() -> None:
    inputs = inputs_of((2, 8, 32), torch.bfloat16)
    turned = {name: x.mT.contiguous().mT if x.dim() == 3 else x for name, x in inputs.items()}
    straight, strided = fused("triton", inputs), fused("triton", turned)
    assert all(torch.equal(a, b) for a, b in zip(straight, strided, strict=True))


def test_fp64_is_refused() -> None:
    inputs = {name: value.double() for name, value in inputs_of(SHAPES[0], torch.float32).items()}
    with pytest.raises(ValueError, match=r"kernels\.norm_residual: triton takes fp32 and bf16"):
        fused("triton", inputs)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"kernels\.norm_residual: triton needs a GPU"):
        fused("triton", inputs_of(SHAPES[0], torch.float32))
