"""The arithmetic of fp8 experts: against every number of the formats, bounds in float64, bugs.

Nothing here knows a GPU: what Transformer Engine does is tests/kernels/test_transformer_engine.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu
from zaya_kernels.grouped_mlp import fp8_emulated as host
from zaya_kernels.grouped_mlp.op import grouped_mlp

from ..helpers.kernels import Passed, assert_close, random, run_pass
from ..helpers.mutation import mutated
from .test_grouped_mlp import COUNTS, inputs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    Rounding = Callable[[Tensor, torch.dtype], tuple[Tensor, float]]

BACKENDS = {"fp8_emulated": host.OCP, "fp8_emulated_fnuz": host.FNUZ}
TYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
LARGEST = dict(zip(TYPES, (448.0, 57344.0, 240.0, 57344.0), strict=True))
MANTISSA = dict(zip(TYPES, (3, 2, 3, 2), strict=True))


def numbers_of(dtype: torch.dtype) -> Tensor:
    """Every finite number of an eight-bit type in order, fp64; even places have even mantissas."""
    codes = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    positive = codes[codes.isfinite()]
    return torch.cat([-positive.flip(0)[:-1], positive])


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` fp64 to the nearest number of the type, ties to even, by looking through all of them."""
    table = numbers_of(dtype)
    middle = len(table) // 2
    gaps = (x.unsqueeze(-1) - table).abs()
    odd = (torch.arange(len(table)) - middle).remainder(2)
    # Of two at the same distance the even one.
    return table[torch.where(gaps == gaps.amin(-1, keepdim=True), odd, 2).argmin(-1)]


def by_formula(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `scaled` stands for, fp64: round(x s) / s, s = largest of the format / largest of x."""
    if not x.numel() or not x.any():
        return x.double()
    scale = torch.tensor(LARGEST[dtype]) / x.abs().max().float()
    return nearest((x.float() * scale).double(), dtype) * (1 / scale).double()


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_are_rounded_to_the_nearest_of_the_format(dtype: torch.dtype) -> None:
    table = numbers_of(dtype)
    assert table.max() == LARGEST[dtype]
    ties = (table[1:] + table[:-1]) / 2
    # The largest number of the format among them, so that the scale is 1.
    x = torch.cat([table, ties, random(3000, seed=1) * LARGEST[dtype] / 6])
    x = x.clamp(-LARGEST[dtype], LARGEST[dtype]).float()
    values, inverse = host.scaled(x, dtype)
    assert values.dtype == dtype and inverse == 1 and inverse.shape == ()
    assert torch.equal(values.double(), nearest(x.double(), dtype))


@pytest.mark.parametrize("dtype", TYPES)
@given(exponent=st.integers(-80, 100), seed=st.integers(0, 99))
def test_a_scale_brings_the_largest_number_to_the_formats_largest(
    dtype: torch.dtype, exponent: int, seed: int
) -> None:
    x = torch.ldexp(random(40, seed=seed, dtype=torch.float32), torch.tensor(exponent))
    values, inverse = host.scaled(x, dtype)
    assert values.double().abs().max() == LARGEST[dtype]
    assert torch.equal(values.double() * inverse.double(), by_formula(x, dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_and_what_is_not_finite(dtype: torch.dtype) -> None:
    values, inverse = host.scaled(torch.zeros(3), dtype)
    assert not values.float().any() and inverse == 1
    assert host.scaled(torch.zeros(0, 4), dtype).inverse == 1
    for bad in (float("nan"), float("inf")):
        values, inverse = host.scaled(torch.tensor([1.0, bad]), dtype)
        assert values.float()[0] == 1 and not values.float()[1].isfinite() and inverse == 1
    # 448 / 1e-40 is no fp32 number.
    values, inverse = host.scaled(torch.tensor([1e-40]), dtype)
    assert values.float().isfinite().all() and inverse.isfinite()


def mlp_by_formula(counts: Sequence[int], x: Mapping[str, Tensor], types: host.Formats) -> Passed:
    """Output and gradients of the projection that `run_pass` takes, written out, fp64."""
    out, grads = [], {name: torch.zeros_like(value) for name, value in x.items()}
    weights = random(*x["rows"].shape, seed=100)
    start = 0
    for expert, count in enumerate(counts):
        span = slice(start, start + count)
        start += count
        gate_up, down = (by_formula(x[name][expert], types.forward) for name in ("gate_up", "down"))
        rows = by_formula(x["rows"][span], types.forward)
        hidden = rows @ gate_up.t()
        width = hidden.shape[1] // 2
        gate, up = hidden[:, :width], hidden[:, width:]
        activated = by_formula(silu(gate) * up, types.forward)
        out.append(activated @ down.t())
        if not count:
            continue
        grad = by_formula(weights[span], types.backward)
        grads["down"][expert] = grad.t() @ activated
        inner, sigmoid = grad @ down, torch.sigmoid(gate)
        to_gate = inner * up * sigmoid * (1 + gate * (1 - sigmoid))
        to_hidden = torch.cat([to_gate, inner * silu(gate)], dim=1)
        to_hidden = by_formula(to_hidden, types.backward)
        grads["gate_up"][expert] = to_hidden.t() @ rows
        grads["rows"][span] = to_hidden @ gate_up
    return Passed([torch.cat(out)], grads)


def call(counts: Sequence[int], backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    sizes = torch.tensor(counts)
    fp8 = backend in BACKENDS
    return [grouped_mlp(x["rows"], sizes, x["gate_up"], x["down"], backend, fp8=fp8)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COUNTS)
def test_experts_follow_the_formula(name: str, backend: str) -> None:
    """Outputs and all gradients, experts without rows and over-full ones, no row at all."""
    counts, inputs = COUNTS[name], inputs_of(COUNTS[name])
    found = run_pass(lambda b, x: call(counts, b, x), backend, inputs)
    assert_close(found, mlp_by_formula(counts, inputs, BACKENDS[backend]), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bf16_only_what_is_kept_in_bf16_is_rounded_besides(backend: str) -> None:
    counts = [24, 0, 40]
    inputs = {key: x.bfloat16() for key, x in inputs_of(counts, 32, 16).items()}
    found = run_pass(lambda b, x: call(counts, b, x), backend, inputs)
    assert all(x.dtype == torch.bfloat16 for x in (*found.outputs, *found.gradients.values()))
    wide = {name: x.double() for name, x in inputs.items()}
    # bf16 moves one number in some thirty over the middle between two of e4m3, by up to an eighth.
    assert_close(found, mlp_by_formula(counts, wide, BACKENDS[backend]), 6e-2)


def product_bound(left: Tensor, right: Tensor, types: tuple[torch.dtype, torch.dtype]) -> Tensor:
    """[m, n]: most that rounding both operands of left [m, k] @ right [k, n] can change it."""
    errors = []
    for x, dtype in zip((left, right), types, strict=True):
        relative = 2.0 ** -(MANTISSA[dtype] + 1)
        smallest = numbers_of(dtype)
        smallest = smallest[smallest > 0].min() / 2 * x.abs().max() / LARGEST[dtype]
        errors.append(torch.maximum(relative * x.abs(), smallest.expand_as(x)))
    return errors[0] @ right.abs() + left.abs() @ errors[1] + errors[0] @ errors[1]


@pytest.mark.parametrize("types", BACKENDS.values(), ids=BACKENDS)
def test_products_err_no_more_than_rounding_the_operands_explains(types: host.Formats) -> None:
    rows, stack = random(64, 48, seed=1), random(1, 32, 48, seed=2)
    grad = random(64, 32, seed=3) * 1e-7
    rows.requires_grad_(True)
    stack.requires_grad_(True)
    out: Tensor = host._Linear.apply(rows, stack, [64], types)  # type: ignore[no-untyped-call]
    out.backward(grad)  # type: ignore[no-untyped-call]
    x, w = rows.detach(), stack.detach()[0]
    assert rows.grad is not None and stack.grad is not None
    f, b = types.forward, types.backward
    for found, left, right, pair in (
        (out.detach(), x, w.t(), (f, f)),
        (rows.grad, grad, w, (b, f)),
        (stack.grad[0], grad.t(), x, (b, f)),
    ):
        errors, bound = (found - left @ right).abs(), product_bound(left, right, pair)
        assert (errors <= bound * (1 + 1e-6)).all()
        # And the bound is no empty one: eight bits err within a hundredth of it.
        assert errors.norm() > bound.norm() / 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_magnitudes_do_not_matter(backend: str) -> None:
    """Powers of two in what comes in or goes back move the result, and no bit besides."""
    counts, inputs = [5, 0, 7], inputs_of([5, 0, 7])
    base = run_pass(lambda b, x: call(counts, b, x), backend, inputs)
    smaller = run_pass(lambda b, x: [call(counts, b, x)[0] * 2.0**-60], backend, inputs)
    for name, gradient in base.gradients.items():
        assert torch.equal(smaller.gradients[name], gradient * 2.0**-60), name
    larger = {**inputs, "down": inputs["down"] * 2.0**40}
    found = run_pass(lambda b, x: call(counts, b, x), backend, larger)
    assert torch.equal(found.outputs[0], base.outputs[0] * 2.0**40)


def test_a_scale_is_of_one_experts_rows_on_this_rank() -> None:
    """So the same rows in two micro-batches are rounded otherwise: no layout keeps the bits."""
    inputs = inputs_of([8, 8])
    whole = call([8, 8], "fp8_emulated", inputs)[0]
    one = {**inputs, "rows": torch.cat([inputs["rows"][:4], inputs["rows"][8:12]])}
    half = call([4, 4], "fp8_emulated", one)[0]
    assert not torch.equal(half, torch.cat([whole[:4], whole[8:12]]))
    # Another expert's rows do not matter.
    other = {**inputs, "rows": torch.cat([inputs["rows"][:8], 1e6 * inputs["rows"][8:]])}
    assert torch.equal(call([8, 8], "fp8_emulated", other)[0][:8], whole[:8])


def test_fp8_is_asked_for_by_both_names() -> None:
    x = inputs_of([3])
    arguments = (x["rows"], torch.tensor([3]), x["gate_up"], x["down"])
    with pytest.raises(ValueError, match="no back end 'eager'; choose from fp8_emulated, "):
        grouped_mlp(*arguments, "eager", fp8=True)
    with pytest.raises(ValueError, match="no back end 'fp8_emulated'; choose from eager, "):
        grouped_mlp(*arguments, "fp8_emulated")
    with pytest.raises(ValueError, match="recompute and main gradients need triton"):
        grouped_mlp(*arguments, "fp8_emulated", fp8=True, recompute=True)


BUGS = {
    "scale turned round": ("1 / scale)", "scale)"),
    "scale dropped": ("(largest > 0) & largest.isfinite()", "largest < 0"),
    "scale not taken back": ("* (left.inverse * right.inverse)", "* left.inverse"),
    "one operand's scale for both": ("left.inverse * right.inverse", "left.inverse**2"),
    "beyond the largest": ("torch.finfo(dtype).max)", "2 * torch.finfo(dtype).max)"),
    "a hundredth of the range": ("torch.finfo(dtype).max)", "0.01 * torch.finfo(dtype).max)"),
    "largest with its sign": ("x.abs().amax()", "x.amax()"),
    "one scale for all experts' weights": ("scaled(stack[expert], types.forward)",
                                           "scaled(stack, types.forward)"),
    "rows of another expert": ("scaled(rows[span], types.forward)",
                               "scaled(rows[span].flip(0), types.forward)"),
    "gradients in the forward format": ("ctx.types.backward", "ctx.types.forward"),
    "rows in the backward format": ("taken = scaled(rows[span], ctx.types.forward)",
                                    "taken = scaled(rows[span], ctx.types.backward)"),
    "gradients not rounded": ("incoming = scaled(grad[span], ctx.types.backward)",
                              "incoming = Scaled(grad[span], torch.ones(()))"),
    "weights not rounded": ("weight = scaled(stack[expert], types.forward)",
                            "weight = Scaled(stack[expert], torch.ones(()))"),
    "activation not rounded": ("SwiGLU.apply(hidden)",
                               "SwiGLU.apply(torch.zeros_like(hidden) + hidden.bfloat16())"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug: str, tmp_path: Path) -> None:
    planted: Any = mutated(host, *BUGS[bug], tmp_path)
    counts, inputs = [5, 1, 11, 2], inputs_of([5, 1, 11, 2])

    def run(_: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        sizes = torch.tensor(counts)
        return [planted.grouped_mlp_fp8_emulated(x["rows"], sizes, x["gate_up"], x["down"])]

    with pytest.raises((AssertionError, RuntimeError)):
        assert_close(run_pass(run, "", inputs), mlp_by_formula(counts, inputs, host.OCP), 1e-6)
