from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels import products
from zaya_kernels.products import (
    batched_product,
    batched_sum,
    by_onednn,
    dense,
    linear,
    product,
)

from ..helpers.kernels import assert_close, random, run_pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


def call(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    function = linear if backend == "eager" else torch.nn.functional.linear
    return [function(x["x"], x["weight"], x.get("bias"))]


@pytest.mark.parametrize("smallest", [1, products.SMALLEST_PRODUCT], ids=["onednn", "torch"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 7), (0, 4, 7), (2, 33, 7)], ids=str)
def test_linear_equals_torchs(
    shape: tuple[int, int, int], bias: bool, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", smallest)
    inputs = {"x": random(*shape, seed=1), "weight": random(9, 7, seed=2)}
    if bias:
        inputs["bias"] = random(9, seed=3)
    exact = run_pass(call, "torch", inputs)
    single = {name: value.float() for name, value in inputs.items()}
    assert_close(run_pass(call, "eager", single), exact, 1e-6)


def test_strided_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", 1)
    a, b = random(40, 30, seed=1).float(), random(30, 20, seed=2).float()
    pairs = [
        (a[:, 5:15], b[5:15]),
        (a.t()[:, 3:9], random(12, 20, seed=3).float()[::2]),
        (a[::3], b.flip(1)),
        (a[4:5], b),
        (a, b.t().contiguous().t()),
    ]
    for left, right in pairs:
        torch.testing.assert_close(
            product(left, right).double(), left.double() @ right.double(), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(
    ("operand", "copied"),
    [
        (torch.randn(6, 8), False),
        (torch.randn(8, 6).t(), False),
        (torch.randn(6, 16)[:, 4:12], True),
        (torch.randn(8, 12)[:, 3:9].t(), True),
        (torch.randn(12, 16)[::2, ::2], True),
        (torch.randn(6, 1).expand(6, 8), True),
    ],
)
def test_operands_are_made_dense(operand: Tensor, copied: bool) -> None:
    """oneDNN falls back to reference loops for a second operand with gaps; nothing else tells."""
    result = dense(operand)
    assert torch.equal(result, operand)
    assert result.is_contiguous() or result.t().is_contiguous()
    assert (result.data_ptr() != operand.data_ptr()) == copied


@pytest.mark.parametrize("smallest", [1, products.SMALLEST_PRODUCT], ids=["onednn", "torch"])
def test_batched_products(smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", smallest)
    a, b = random(3, 5, 7, seed=1).float(), random(3, 7, 4, seed=2).float()
    base = random(3, 5, 4, seed=3).float()
    exact = a.double() @ b.double()
    torch.testing.assert_close(batched_product(a, b).double(), exact, rtol=0, atol=1e-5)
    found = batched_sum(base, a, b, beta=-2.0, alpha=3.0).double()
    torch.testing.assert_close(found, 3 * exact - 2 * base.double(), rtol=0, atol=1e-5)
    assert batched_product(a[:0], b[:0]).shape == (0, 5, 4)
    assert torch.equal(base, random(3, 5, 4, seed=3).float())


def test_frozen_operands_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", 1)
    x, weight = random(4, 3, seed=1).float(), random(2, 3, seed=2).float().requires_grad_(True)
    torch.autograd.backward(linear(x, weight).sum())
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(2, 3))


def test_onednn_takes_large_fp32_products_alone() -> None:
    assert by_onednn(torch.zeros(128, 128), 128)
    assert not by_onednn(torch.zeros(127, 128), 128)
    assert not by_onednn(torch.zeros(128, 128, dtype=torch.float64), 128)
    assert not by_onednn(torch.zeros(128, 128, dtype=torch.bfloat16), 128)
    assert not by_onednn(torch.zeros(128, 128, device="meta"), 128)
