"""Experts by torch's grouped product, on the CPU: against float64, beside eager; planted bugs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.grouped_mlp import grouped_mm, op, swiglu

from ..helpers.kernels import assert_bitwise, assert_close, assert_no_worse, random, run_pass
from ..helpers.mutation import mutated
from .test_grouped_mlp import COUNTS, call, inputs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

HIDDEN, WIDTH = 24, 16


def rounded(counts: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in inputs_of(counts, HIDDEN, WIDTH).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    """Outputs and every gradient; in bf16 intermediate results are rounded where eager's are."""
    counts = COUNTS[name]
    inputs = rounded(counts, dtype)
    assert_no_worse(lambda b, x: call(counts, b, x), inputs, "grouped_mm", slack=1.25)


@pytest.mark.parametrize("name", ["even", "empty_first", "empty_middle", "no_rows"])
def test_experts_without_rows_get_a_gradient_of_zeros(name: str) -> None:
    counts = COUNTS[name]
    inputs = rounded(counts, torch.bfloat16)
    passed = run_pass(lambda b, x: call(counts, b, x), "grouped_mm", inputs)
    for tensor in ("gate_up", "down"):
        silent = [not grad.any() for grad in passed.gradients[tensor]]
        assert silent == [count == 0 for count in counts]


def test_rows_of_no_expert_are_left_out() -> None:
    counts, spare = [5, 0, 18], 20
    inputs = rounded(counts, torch.float32)
    expected = run_pass(lambda b, x: call(counts, b, x), "grouped_mm", inputs)
    nothing = torch.full((spare, HIDDEN), float("nan"))

    def longer(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        rows = torch.cat([x["rows"], nothing])
        return [out[: sum(counts)] for out in call(counts, backend, {**x, "rows": rows})]

    found = run_pass(longer, "grouped_mm", inputs)
    assert torch.equal(found.outputs[0], expected.outputs[0])
    for name, gradient in expected.gradients.items():
        assert torch.equal(gradient, found.gradients[name]), name


def test_two_runs_agree_bitwise() -> None:
    counts = COUNTS["odd"]
    inputs = rounded(counts, torch.bfloat16)
    assert_bitwise(lambda b, x: call(counts, b, x), inputs, "grouped_mm")


def test_what_it_cannot_compute_is_refused() -> None:
    counts = [3, 2]
    for inputs, said in (
        (inputs_of(counts, 8, 8), "takes fp32 and bf16, not torch.float64"),
        (rounded(counts, torch.float32) | {"down": random(2, HIDDEN, 6, seed=1)}, "multiples of 4"),
        (
            {n: x.bfloat16() for n, x in inputs_of(counts, 12, 8).items()},
            "multiples of 8 in torch.bfloat16, not 12 and 8",
        ),
    ):
        with pytest.raises(ValueError, match=r"kernels\.grouped_mlp: grouped_mm") as caught:
            call(counts, "grouped_mm", inputs)
        assert said in str(caught.value)


def test_main_gradients_are_refused() -> None:
    x = rounded([3], torch.float32)
    with pytest.raises(ValueError, match="grouped_mm keeps the pre-activation"):
        op.grouped_mlp(
            x["rows"], torch.tensor([3]), x["gate_up"], x["down"], "grouped_mm", recompute=True
        )


BUGS = {
    "rows of the expert before": ("counts.cumsum(0)", "(counts.cumsum(0) - counts)"),
    "gate and up as they are stored": ("swiglu(hidden), down", "swiglu(hidden.flip(1)), down"),
    "rows' gradient turned": ("mm(grad_hidden, gate_up", "mm(-grad_hidden, gate_up"),
    "gradient of the rows as activation": ("grad.t(), activated", "grad.t(), activated * 2"),
    "gate and up's gradient by itself": ("grad_hidden.t(), rows", "grad_hidden.t(), rows.abs()"),
    "activation's gradient by transposed weights": (
        "grouped_mm(grad, down, offs=ends)",
        "grouped_mm(grad, down.flip(1), offs=ends)",
    ),
}  # fmt: skip
ELEMENTWISE_BUGS = {
    "slope of silu left out": ("torch.addcmul(sigmoid, silu, 1 - sigmoid)", "sigmoid"),
    "up where gate is": ("hidden[:, width:])\n\n\ndef", "hidden[:, :width])\n\n\ndef"),
    "gradients changed over": (
        "torch.mul(grad, silu, out=grad_hidden[:, width:])",
        "torch.mul(grad, silu, out=grad_hidden[:, :width])",
    ),
    "activation without up": ("return silu.mul_(up), grad_hidden", "return silu, grad_hidden"),
}


def check() -> None:
    counts = [17, 0, 3]
    inputs = rounded(counts, torch.float32)
    exact = run_pass(
        lambda b, x: call(counts, b, x), "reference", {n: x.double() for n, x in inputs.items()}
    )
    assert_close(run_pass(lambda b, x: call(counts, b, x), "grouped_mm", inputs), exact, 4e-6)


def test_without_a_bug_nothing_is_caught() -> None:
    check()


@pytest.mark.parametrize("bug", [*BUGS, *ELEMENTWISE_BUGS])
def test_a_bug_is_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug in BUGS:
        planted = mutated(grouped_mm, *BUGS[bug], tmp_path)
        monkeypatch.setitem(op.BACKENDS, "grouped_mm", planted.grouped_mlp_grouped_mm)
    else:
        planted = mutated(swiglu, *ELEMENTWISE_BUGS[bug], tmp_path)
        for name in ("swiglu", "swiglu_backward"):
            monkeypatch.setattr(grouped_mm, name, getattr(planted, name))
    with pytest.raises(AssertionError):
        check()
