"""What the back end in C does at the ends of its range, and what it refuses to touch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.attention.native import _MOST_HEADS
from zaya_kernels.attention.op import attention
from zaya_kernels.grouped_mlp.op import grouped_mlp
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy
from zaya_kernels.native.library import SOURCES
from zaya_kernels.native.product import multiply
from zaya_kernels.norm_residual.op import ResidualScales, residual, rms_norm

from ..helpers.kernels import error, random, run_pass
from ..helpers.models import NATIVE, TINY, packed, random_model, random_tokens, with_kernels
from . import test_cca, test_grouped_mlp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@TYPES
def test_gates_far_from_zero_are_closed_or_open(dtype: torch.dtype) -> None:
    """Where e^-x leaves fp32; a vector of columns and a rest."""
    gates = torch.tensor([-300.0, -200, -100, -89.5, -88.5, -80, -20, 20, 80, 89.5, 100, 200, 300])
    up = torch.cat([torch.ones(17, 1), torch.full((17, 1), 0.5)])
    inputs: dict[str, Tensor] = {
        "rows": gates[:, None].to(dtype),
        "gate_up": up[None].to(dtype),
        "down": torch.full((1, 1, 17), 0.25).to(dtype),
    }
    found, usual = (
        run_pass(lambda name, x: test_grouped_mlp.call([len(gates)], name, x), name, inputs)
        for name in ("native", "eager")
    )
    steps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.outputs, usual.outputs, rtol=steps, atol=1e-30)
    torch.testing.assert_close(found.gradients, usual.gradients, rtol=steps, atol=1e-30)


@TYPES
@pytest.mark.parametrize("turned", [False, True])
def test_an_infinity_in_a_pair_stays_one(dtype: torch.dtype, turned: bool) -> None:
    """Two bf16 that are multiplied together stand in 4 bytes, which are no number of their own."""
    a = torch.tensor([[1.0, float("inf")], [float("-inf"), 2.0]]).repeat(8, 3).to(dtype)
    left = a.t().contiguous().t() if turned else a
    found = multiply(left, torch.ones(6, 5, dtype=dtype), torch.empty(16, 5))
    assert torch.equal(found, (a.double() @ torch.ones(6, 5).double()).float())


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_that_are_no_class_are_refused(label: int) -> None:
    hidden, weight = random(3, 4, seed=1).float(), random(7, 4, seed=2).float()
    with pytest.raises(IndexError, match=f"label {label} is none of 7 classes"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, label, 6]), "native")


def test_labels_of_any_integer_type_are_taken() -> None:
    hidden, weight = random(3, 4, seed=1).float(), random(7, 4, seed=2).float()
    labels = torch.tensor([0, -100, 6])
    expected = linear_cross_entropy(hidden, weight, labels, "native")
    assert linear_cross_entropy(hidden, weight, labels.int(), "native") == expected
    with pytest.raises(ValueError, match=r"linear_cross_entropy: shape \[7, 4\], expected \[any"):
        linear_cross_entropy(random(3, 5, seed=1).float(), weight, labels, "native")
    with pytest.raises(ValueError, match=r"linear_cross_entropy: shape \[3\], expected \[2\]"):
        linear_cross_entropy(hidden[:2], weight, labels, "native")


@pytest.mark.parametrize(
    ("counts", "rows", "told"),
    [
        ([2, 2], [4, 6], r"rows: shape \[4, 6\], expected \[any, 8\]"),
        ([6, -2], [4, 8], r"counts are \[6, -2\], expected none below 0"),
        ([1, 1, 2], [4, 8], r"counts: shape \[3\], expected \[2\]"),
    ],
)
def test_rows_that_experts_cannot_take_are_refused(
    counts: Sequence[int], rows: Sequence[int], told: str
) -> None:
    inputs = {name: x.float() for name, x in test_grouped_mlp.inputs_of([2, 2], 8).items()}
    with pytest.raises(ValueError, match=told):
        test_grouped_mlp.call(counts, "native", inputs | {"rows": torch.zeros(*rows)})
    with pytest.raises(ValueError, match=r"gate_up: shape \[2, 8, 8\], expected \[2, 10, 8\]"):
        narrow = inputs["gate_up"][:, :8]
        test_grouped_mlp.call([2, 2], "native", inputs | {"gate_up": narrow})


def test_counts_of_any_integer_type_are_taken() -> None:
    x = {name: x.float() for name, x in test_grouped_mlp.inputs_of([3, 1], 8).items()}
    found, expected = (
        grouped_mlp(x["rows"], torch.tensor([3, 1]).to(kind), x["gate_up"], x["down"], "native")
        for kind in (torch.int32, torch.int64)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("q", "k", "told"),
    [
        ((1, 12, 4, 8), (1, 13, 2, 8), "the plan is none of 12 queries and 13 keys"),
        ((1, 13, 4, 8), (1, 12, 2, 8), "the plan is none of 13 queries and 12 keys"),
        ((1, 14, 4, 8), (1, 14, 2, 8), "the plan is none of 14 queries and 14 keys"),
        ((1, 13, 4, 8), (1, 13, 3, 8), "4 heads of queries, 3 of keys"),
        ((1, 13, 386, 8), (1, 13, 2, 8), "386 heads of queries to 2 of keys, native takes 192"),
        ((1, 13, 4, 8), (1, 13, 2, 4), r"k: shape \[1, 13, 2, 4\], expected \[1, any, any, 8\]"),
    ],
)
def test_keys_and_plans_of_other_shapes_are_refused(
    q: Sequence[int], k: Sequence[int], told: str
) -> None:
    plan = packed([[5, 8]], 13).attention
    with pytest.raises(ValueError, match=told):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), plan, "native")
    with pytest.raises(ValueError, match=r"v: shape \[1, 13, 1, 8\], expected \[1, 13, 2, 8\]"):
        whole = torch.zeros(1, 13, 2, 8)
        attention(torch.zeros(1, 13, 4, 8), whole, whole[:, :, :1], plan, "native")


def test_most_heads_are_those_of_a_block() -> None:
    assert f"#define BLOCK_ROWS {_MOST_HEADS}\n" in (SOURCES / "attention.c").read_text()


def test_what_cca_cannot_read_is_refused() -> None:
    shape = test_cca.Shape(taps=(2, 3))
    inputs = {name: x.float() for name, x in test_cca.inputs_of(shape).items()}
    context = test_cca.context_of(shape, test_cca.DOCUMENTS)
    for name in ("depthwise", "depthwise_bias", "grouped_bias", "temperature"):
        with pytest.raises(ValueError, match=f"cca: {name}: shape .* expected"):
            test_cca.call("native", inputs | {name: inputs[name][:-1]}, context)
    with pytest.raises(ValueError, match="cca: qk: shape"):
        test_cca.call("native", inputs | {"qk": inputs["qk"][..., 1:]}, context)
    wide = test_cca.context_of(replace(shape, rotated=16), test_cca.DOCUMENTS)
    with pytest.raises(ValueError, match="channels mixed from 24 and 16 rotated"):
        test_cca.call("native", inputs, wide)
    for name in ("positions", "cos", "sin"):
        with pytest.raises(ValueError, match=f"cca: {name}: shape"):
            test_cca.call("native", inputs, replace(context, **{name: getattr(context, name)[:1]}))
    halo = torch.zeros(2, 1, shape.halo, shape.channels)
    values = torch.zeros(2, 1, 1, shape.kv_heads * shape.head_dim // 2)
    for other, told in (
        (halo[:, :, 1:], "12 tokens in 1 chunks behind 2 rows, .* at least 3"),
        (halo.bfloat16(), "takes one type"),
        (halo[:1], "cca: halo_qk: shape"),
    ):
        with pytest.raises(ValueError, match=told):
            test_cca.call("native", inputs, replace(context, halo_qk=other, halo_v=values))


def test_positions_of_any_integer_type_are_taken() -> None:
    shape = test_cca.Shape()
    inputs = {name: x.float() for name, x in test_cca.inputs_of(shape).items()}
    context = test_cca.context_of(shape, test_cca.DOCUMENTS)
    short = replace(context, positions=context.positions.int())
    for found, expected in zip(
        test_cca.call("native", inputs, short),
        test_cca.call("native", inputs, context),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_products_of_other_shapes_are_refused() -> None:
    a, b, out = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"product: right: shape \[3, 5\], expected \[4, any\]"):
        multiply(a, b[:3], out)
    with pytest.raises(ValueError, match=r"product: out: shape \[2, 5\], expected \[3, 5\]"):
        multiply(a, b, out[:2])
    with pytest.raises(ValueError, match="product: rows of out have stride 3, expected 1"):
        multiply(a, b, torch.zeros(5, 3).t())
    with pytest.raises(ValueError, match=r"product: torch.float32 to torch.bfloat16"):
        multiply(a, b, out.bfloat16())
    with pytest.raises(ValueError, match=r"product: torch.bfloat16 to torch.bfloat16 added"):
        multiply(a.bfloat16(), b.bfloat16(), out.bfloat16(), add=True)


def test_rows_that_norms_cannot_take_are_refused() -> None:
    stream, row = torch.zeros(2, 3, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"norm_residual: shape \[7\], expected \[8\]"):
        rms_norm(stream, row[1:], 1e-5, "native")
    with pytest.raises(ValueError, match=r"shape \[2, 2, 8\], expected \[2, 3, 8\]"):
        residual(stream, stream[:, 1:], ResidualScales(row, row, row, row), "native")


def test_a_bf16_model_with_every_kernel_in_c() -> None:
    """One step's loss and gradients, against eager torch of the same weights."""
    usual = random_model(TINY, seed=2).to(torch.bfloat16)
    tokens, layout = random_tokens(TINY, 2, 40, seed=2), packed([[25, 15], [40]], 40)
    losses, gradients = [], []
    for model in (usual, with_kernels(usual, NATIVE)):
        loss = model(tokens, tokens, layout).loss
        made = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.detach())
        gradients.append(torch.cat([x.flatten() for x in made]).float())
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)
    assert error(gradients[1], gradients[0]) <= 0.05
