from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zaya_kernels import products
from zaya_kernels.attention import blocks
from zaya_kernels.attention import segments as planning
from zaya_kernels.attention.flash import flash, flash_backward, flash_causal
from zaya_kernels.attention.op import attention
from zaya_kernels.attention.segments import (
    AttentionPlan,
    Segment,
    key_query_pairs,
    plan_attention,
)

from zaya_train.model import SequenceLayout

from ..helpers.kernels import (
    assert_close,
    assert_low_precision,
    random,
    run_pass,
)
from ..helpers.models import CPU, packed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


def inputs_of(batch: int, queries: int, keys: int, heads: tuple[int, int]) -> dict[str, Tensor]:
    return {
        "q": random(batch, queries, heads[0], 4, seed=1),
        "k": random(batch, keys, heads[1], 4, seed=2),
        "v": random(batch, keys, heads[1], 4, seed=3),
    }


def call(backend: str, x: Mapping[str, Tensor], plan: AttentionPlan) -> Sequence[Tensor]:
    return [attention(x["q"], x["k"], x["v"], plan, backend)]


def dense(x: Mapping[str, Tensor], sees: Tensor) -> Sequence[Tensor]:
    """Attention with a mask [B, S, T] over everything, by its definition."""
    group = x["q"].shape[2] // x["k"].shape[2]
    k, v = (x[name].repeat_interleave(group, dim=2) for name in ("k", "v"))
    scores = torch.einsum("bqhd,bkhd->bhqk", x["q"], k) / x["q"].shape[-1] ** 0.5
    weights = scores.masked_fill(~sees[:, None], float("-inf")).softmax(dim=-1)
    return [torch.einsum("bhqk,bkhd->bqhd", weights, v)]


def sees(documents: Sequence[Sequence[int]], row_tokens: int) -> Tensor:
    """[B, S, S]: same document, and not later."""
    rows = []
    for lengths in documents:
        full = [*lengths, row_tokens - sum(lengths)]
        owner = torch.repeat_interleave(torch.arange(len(full)), torch.tensor(full))
        rows.append((owner[:, None] == owner[None]).tril())
    return torch.stack(rows)


LAYOUTS = {
    "whole": ([[13], [13]], 13),
    "packed": ([[5, 1, 7], [1, 12]], 13),
    "padding": ([[5, 1], [13]], 13),
    "singles": ([[1] * 9], 9),
    "long_and_short": ([[70, 3, 17, 1, 9]], 100),
}


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_attention_equals_its_definition(name: str, heads: tuple[int, int]) -> None:
    documents, row_tokens = LAYOUTS[name]
    plan = packed(documents, row_tokens).attention
    inputs = inputs_of(len(documents), row_tokens, row_tokens, heads)
    mask = sees(documents, row_tokens)
    expected = run_pass(lambda _, x: dense(x, mask), "dense", inputs)
    for backend in ("eager", "reference"):
        found = run_pass(lambda name, x: call(name, x, plan), backend, inputs)
        assert_close(found, expected, 1e-10)


CHUNKS = {
    "tail": [(20, 32)],
    "zigzag": [(0, 8), (24, 32)],
    "reversed": [(16, 24), (0, 8)],
    "one_token": [(5, 6)],
}


@pytest.mark.parametrize("documents", [[[32], [9, 23]], [[8, 1, 15, 8], [7, 2, 14]]], ids=str)
@pytest.mark.parametrize("name", CHUNKS)
def test_local_chunks_against_the_gathered_row(
    name: str, documents: Sequence[Sequence[int]]
) -> None:
    chunks = CHUNKS[name]
    local = torch.cat([torch.arange(start, end) for start, end in chunks])
    plan = SequenceLayout.of_documents(documents, 32, CPU, chunks).attention
    inputs = inputs_of(2, len(local), 32, (4, 2))
    mask = sees(documents, 32)[:, local]
    expected = run_pass(lambda _, x: dense(x, mask), "dense", inputs)
    for backend in ("eager", "reference"):
        found = run_pass(lambda name, x: call(name, x, plan), backend, inputs)
        assert_close(found, expected, 1e-10)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor any operation returns, and what ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out


def test_long_rows_need_no_mask_and_no_scores() -> None:
    """2,048 queries at the end of a document of 8,192: everything stays linear in the length."""
    plan = plan_attention([Segment(0, 2048, 0, 8192)], 2048, CPU, whole_rows=False)
    inputs = inputs_of(1, 2048, 8192, (2, 1))
    for x in inputs.values():
        x.requires_grad_()
    with LargestTensor() as largest:
        (out,) = call("eager", inputs, plan)
        torch.autograd.backward(out.sum())
    assert largest.elements <= 2 * inputs["k"].numel() < 2048 * 8192 // 100


def test_bf16_behind_earlier_keys() -> None:
    plan = plan_attention([Segment(0, 40, 0, 140)], 40, CPU, whole_rows=False)
    inputs = inputs_of(1, 40, 140, (4, 2))
    assert_low_precision(lambda name, x: call(name, x, plan), inputs, torch.bfloat16, 2**-6)


def test_behind_calls_the_kernels_of_a_gpu_rightly() -> None:
    """Signatures and shapes alone: fake tensors stand in for a device."""
    with FakeTensorMode():
        q = torch.empty(1, 4, 40, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(1, 2, 100, 64, dtype=torch.bfloat16, device="cuda")
        out, lse = flash(q, k, k, False)
        grads = flash_backward(q, (q, k, k), out, lse, False)
    assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, (1, 4, 40))
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


RULE = (
    r"kernels\.attention={}: no flash attention in torch\.float32 on cuda; set "
    r"precision\.compute_dtype=bf16, or kernels\.attention=triton, or kernels\.attention=refer"
)


def test_a_gpu_gets_flash_attention_or_an_error_that_names_the_choice() -> None:
    """Documents of 1,000 tokens in bf16: nothing as large as a document's scores, and no choice of
    torch's; in fp32, where torch would take the form that holds them, an error."""
    plan = packed([[1000, 24]], 1024).attention
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        places = {
            name: torch.empty(getattr(plan, name).shape, dtype=torch.int64, device="cuda")
            for name in ("taken", "inverse", "own_keys")
        }
        plan = replace(plan, **places)  # type: ignore[arg-type]
        q = torch.empty(1, 1024, 4, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(1, 1024, 2, 64, dtype=torch.bfloat16, device="cuda")
        with LargestTensor() as largest:
            out = attention(q, k, k, plan, "eager")
        for backend in ("eager", "sdpa"):
            with pytest.raises(ValueError, match=RULE.format(backend)):
                attention(q.float(), k.float(), k.float(), plan, backend)
    assert out.shape == q.shape
    assert largest.names.count("_scaled_dot_product_flash_attention") == 2
    assert largest.elements < 1000 * 1000


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
def test_the_form_for_gpus_on_a_cpu(heads: tuple[int, int]) -> None:
    inputs = inputs_of(2, 13, 13, heads)
    mask = sees([[13], [13]], 13)

    def causal(_: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [flash_causal(*(x[n].transpose(1, 2) for n in "qkv")).transpose(1, 2)]

    expected = run_pass(lambda _, x: dense(x, mask), "dense", inputs)
    assert_close(run_pass(causal, "flash", inputs), expected, 1e-10)


def test_pairs_of_keys_and_queries() -> None:
    documents = [[5, 1, 7], [1, 12]]
    plan = packed(documents, 16).attention
    assert key_query_pairs(plan) == int(sees(documents, 16).sum())
    plan = SequenceLayout.of_documents(documents, 16, CPU, [(4, 8), (12, 16)]).attention
    local = [4, 5, 6, 7, 12, 13, 14, 15]
    assert key_query_pairs(plan) == int(sees(documents, 16)[:, local].sum())


@pytest.mark.parametrize("scores", [2**23, 200], ids=["blocks_of_8", "smaller"])
@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"singles"}))
def test_blocks_of_queries_in_onednn(
    name: str, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 on the CPU, with the products' threshold and the blocks small enough for tests. Not for
    documents of one token: their exact gradients are zero and any rounding is too much."""
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", 1)
    monkeypatch.setattr(blocks, "_BLOCK", 8)
    monkeypatch.setattr(blocks, "_SCORES", scores)
    documents, row_tokens = LAYOUTS[name]
    plan = packed(documents, row_tokens).attention
    inputs = inputs_of(len(documents), row_tokens, row_tokens, (4, 2))
    assert_low_precision(lambda name, x: call(name, x, plan), inputs, torch.float32, 2e-6)


def test_blocks_take_what_pays_off() -> None:
    q, k = torch.zeros(1, 128, 8, 64), torch.zeros(1, 128, 2, 64)
    assert blocks.worthwhile(q, k)
    assert not blocks.worthwhile(q[:, :64], k[:, :64])
    assert not blocks.worthwhile(q.double(), k.double())


def test_bf16_inputs_keep_bf16_accuracy() -> None:
    documents, row_tokens = LAYOUTS["long_and_short"]
    plan = packed(documents, row_tokens).attention
    inputs = inputs_of(1, row_tokens, row_tokens, (4, 2))
    assert_low_precision(lambda name, x: call(name, x, plan), inputs, torch.bfloat16, 2**-6)


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(0, 4, 0, 4)],
        [Segment(0, 4, 0, 4), Segment(5, 3, 5, 3)],
        [Segment(0, 4, 0, 4), Segment(3, 4, 3, 4)],
        [Segment(0, 4, 0, 4), Segment(4, 4, 4, 4), Segment(0, 1, 0, 1)],
    ],
    ids=["missing", "gap", "overlap", "twice"],
)
def test_every_query_is_covered_once(segments: list[Segment]) -> None:
    with pytest.raises(ValueError, match=r"cover \d+ queries of 8"):
        plan_attention(segments, 8, CPU, whole_rows=False)


@given(st.integers(1, 200_000))
def test_buckets_hold_their_length_and_waste_little(length: int) -> None:
    padded = planning.padded_length(length)
    assert length <= padded and padded % 8 == 0
    assert padded - length < max(8, length / 4)


def test_buckets_are_few() -> None:
    assert len({planning.padded_length(length) for length in range(4097, 8193)}) == 4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(1, 30), min_size=1, max_size=6).filter(lambda row: sum(row) <= 64),
        min_size=1,
        max_size=3,
    )
)
def test_groups_hold_each_query_in_its_place(documents: list[list[int]]) -> None:
    plan = packed(documents, 64).attention
    assert torch.equal(plan.taken[plan.inverse], torch.arange(64 * len(documents)))
    assert int(plan.groups.prod(dim=1).sum()) == plan.taken.numel()
    assert plan.behind.numel() == 0
