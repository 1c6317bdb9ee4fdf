from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zaya_kernels import products
from zaya_kernels.grouped_mlp.eager import _window
from zaya_kernels.grouped_mlp.op import grouped_mlp

from ..helpers.kernels import assert_backends_agree, assert_low_precision, random, run_pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

COUNTS = {
    "even": [3, 3, 3],
    "odd": [5, 1, 11, 2],
    "empty_first": [0, 4, 3],
    "empty_last": [4, 3, 0],
    "empty_middle": [4, 0, 0, 3],
    "one_takes_all": [0, 0, 9, 0],
    "one_row": [0, 1],
    "no_rows": [0, 0, 0],
    "one_expert": [7],
    "windows_overlap": [17, 33, 15, 47, 2],
}


def inputs_of(counts: Sequence[int], hidden: int = 7, width: int = 5) -> dict[str, Tensor]:
    experts = len(counts)
    return {
        "rows": random(sum(counts), hidden, seed=1),
        "gate_up": random(experts, 2 * width, hidden, seed=2),
        "down": random(experts, hidden, width, seed=3),
    }


def call(counts: Sequence[int], backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    sizes = torch.tensor(counts)
    return [grouped_mlp(x["rows"], sizes, x["gate_up"], x["down"], backend)]


@pytest.mark.parametrize("name", COUNTS)
def test_eager_equals_reference(name: str) -> None:
    counts = COUNTS[name]
    assert_backends_agree(lambda backend, x: call(counts, backend, x), inputs_of(counts))


@pytest.mark.parametrize("name", COUNTS)
def test_eager_equals_reference_in_onednn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on the CPU: products over windows of a few sizes, which reach into other experts."""
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", 1)
    counts = COUNTS[name]
    inputs = inputs_of(counts, hidden=8, width=6)
    assert_low_precision(lambda backend, x: call(counts, backend, x), inputs, torch.float32, 2e-6)


@pytest.mark.parametrize("name", ["odd", "empty_middle", "no_rows"])
def test_bf16_keeps_bf16_accuracy(name: str) -> None:
    counts = COUNTS[name]
    assert_low_precision(
        lambda backend, x: call(counts, backend, x), inputs_of(counts), torch.bfloat16, 2**-6
    )


@pytest.mark.parametrize("name", ["even", "empty_first", "no_rows"])
def test_experts_without_rows_get_a_gradient_of_zeros(name: str) -> None:
    counts = COUNTS[name]
    passed = run_pass(lambda backend, x: call(counts, backend, x), "eager", inputs_of(counts))
    for tensor in ("gate_up", "down"):
        silent = [not grad.any() for grad in passed.gradients[tensor]]
        assert silent == [count == 0 for count in counts]


def test_gradients_agree_with_finite_differences() -> None:
    counts = torch.tensor([2, 0, 3])
    inputs = inputs_of([2, 0, 3], hidden=3, width=2)
    assert torch.autograd.gradcheck(
        lambda rows, gate_up, down: grouped_mlp(rows, counts, gate_up, down, "eager"),
        tuple(value.requires_grad_(True) for value in inputs.values()),
    )


@given(st.integers(0, 5000), st.integers(1, 3000), st.integers(0, 3000))
def test_windows_hold_their_span_and_come_in_few_sizes(start: int, count: int, rest: int) -> None:
    total = start + count + rest
    window = _window(slice(start, start + count), total)
    assert 0 <= window.start <= start and start + count <= window.stop <= total
    width = window.stop - window.start
    assert width == total or (width % 16 == 0 and width - count < max(16, count / 8))
