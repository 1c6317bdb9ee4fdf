"""Triton attention, interpreted, against float64 and against eager torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from zaya_kernels.attention.op import attention
from zaya_kernels.attention.segments import AttentionPlan, Segment, plan_attention

from zaya_train.model import SequenceLayout

from ..helpers.kernels import assert_bitwise, assert_close, assert_no_worse, random, run_pass
from ..helpers.models import CPU, packed
from .test_attention import call, sees

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.attention import triton
from zaya_kernels.workshop.interpreter import counting

pytestmark = pytest.mark.usefixtures("interpreter")

# Blocks hold 32 tokens in fp32 and up to 128 in bf16: some seen whole, odd last ones.
DOCUMENTS, ROW = [[1, 1, 131, 2, 33]], 168
CHUNKS = {"zigzag": [(0, 40), (150, 180)], "reversed": [(100, 180), (33, 34), (0, 33)]}
CHUNKED = [[20, 150]], 180


def inputs_of(
    plan: AttentionPlan, shape: tuple[int, int], dtype: torch.dtype, heads: tuple[int, int] = (2, 1)
) -> dict[str, Tensor]:
    """q [B, S, ...] and k, v [B, T, ...] for (B, T); S follows from the plan."""
    batch, keys = shape
    queries = plan.inverse.numel() // batch
    sizes = {"q": (queries, heads[0]), "k": (keys, heads[1]), "v": (keys, heads[1])}
    return {
        name: random(batch, length, count, 32, seed=i, dtype=dtype)
        for i, (name, (length, count)) in enumerate(sizes.items())
    }


def chunked(name: str) -> AttentionPlan:
    documents, row = CHUNKED
    return SequenceLayout.of_documents(documents, row, CPU, CHUNKS[name]).attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_documents_are_as_exact_as_eager(dtype: torch.dtype) -> None:
    plan = packed(DOCUMENTS, ROW).attention
    inputs = inputs_of(plan, (1, ROW), dtype)
    assert_no_worse(lambda name, x: call(name, x, plan), inputs, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_against_the_gathered_row(name: str, dtype: torch.dtype) -> None:
    """Keys that one segment sees, that two see, and that none sees (zero gradient)."""
    plan = chunked(name)
    inputs = inputs_of(plan, (1, CHUNKED[1]), dtype)
    assert_no_worse(lambda backend, x: call(backend, x, plan), inputs, "triton")


@pytest.mark.parametrize(("heads", "size"), [((3, 3), 16), ((4, 1), 64), ((2, 2), 128)], ids=str)
def test_heads_and_sizes(heads: tuple[int, int], size: int) -> None:
    plan = packed([[5, 28]], 33).attention
    inputs = {
        name: random(1, 33, heads[name != "q"], size, seed=i, dtype=torch.bfloat16)
        for i, name in enumerate("qkv")
    }
    assert_no_worse(lambda backend, x: call(backend, x, plan), inputs, "triton")


@pytest.mark.parametrize("backend", ["triton", "eager", "sdpa", "reference"])
def test_segments_without_queries_are_left_out(backend: str) -> None:
    """Documents of other ranks: their keys lie in the row, nothing of this rank sees them."""
    segments = [Segment(0, 0, 0, 7), Segment(0, 9, 7, 9), Segment(9, 0, 16, 0)]
    plan = plan_attention(segments, 9, CPU, whole_rows=False)
    inputs = inputs_of(plan, (1, 40), torch.float32)
    alone = packed([[9]], 9).attention
    expected = run_pass(
        lambda name, x: [attention(x["q"], x["k"][:, 7:16], x["v"][:, 7:16], alone, name)],
        "reference",
        inputs,
    )
    found = run_pass(lambda name, x: call(name, x, plan), backend, inputs)
    assert_close(found, expected, 1e-6)
    assert not found.gradients["k"][:, :7].any() and not found.gradients["v"][:, 16:].any()


def blocks_with_work(mask: Tensor, places: Sequence[Segment], rows: int, columns: int) -> int:
    """Blocks of a segment's queries by its document's keys that hold a pair to compute."""
    count = 0
    for s in places:
        part = mask[s.query_start : s.query_start + s.query_count]
        part = part[:, s.key_start : s.key_start + s.key_count]
        down, right = -part.shape[0] % rows, -part.shape[1] % columns
        padded = torch.nn.functional.pad(part, (0, right, 0, down))
        tiles = padded.view(len(padded) // rows, rows, -1, columns)
        count += int(tiles.any(dim=3).any(dim=1).sum())
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["one document", "packed", *CHUNKS])
def test_no_block_is_computed_that_is_masked_whole(name: str, dtype: torch.dtype) -> None:
    if name in ("one document", "packed"):
        documents, row = (DOCUMENTS, ROW) if name == "packed" else ([[ROW]], ROW)
        plan, mask = packed(documents, row).attention, sees(documents, row)[0]
    else:
        plan, (documents, row) = chunked(name), CHUNKED
        local = torch.cat([torch.arange(start, end) for start, end in CHUNKS[name]])
        mask = sees(documents, row)[0, local]
    inputs = inputs_of(plan, (1, mask.shape[1]), dtype)
    segments = [Segment(*row) for row in plan.segments.tolist()]
    with counting() as counts:
        run_pass(lambda backend, x: call(backend, x, plan), "triton", inputs)
    for launched, dots in zip(counts, (2, 3, 4), strict=True):
        config = (
            triton.WIDE_CONFIGS["gfx942"]
            if dtype == torch.float32
            else triton.HALF_CONFIGS[launched.kernel]["gfx942"]
        )
        rows, columns = config.blocks["BM"], config.blocks["BN"]
        blocks = 2 * blocks_with_work(mask, segments, rows, columns)
        assert launched.dot_operations == dots * 2 * rows * columns * 32 * blocks, launched.kernel


def test_two_runs_agree_bitwise() -> None:
    plan = chunked("reversed")
    inputs = inputs_of(plan, (1, CHUNKED[1]), torch.bfloat16)
    assert_bitwise(lambda name, x: call(name, x, plan), inputs, "triton")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    """The cheap rounding of gfx942 keeps it, and it stays in its document."""
    plan = packed([[30, 40]], 70).attention
    inputs = inputs_of(plan, (1, 70), torch.bfloat16)
    inputs["q"][0, 50], inputs["v"][0, 35, 0, 0] = bad, bad
    (out,) = call("triton", inputs, plan)
    assert out[0, :30].isfinite().all()
    assert out[0, 50].isnan().any() and not out[0, 35:, :, 0].isfinite().any()


def test_offsets_beyond_32_bits() -> None:
    """Tokens so far apart that the last one lies 2.4 billion elements behind the first; the pages
    between them are never touched."""
    tokens, stride = 200, 12_000_000
    plan = packed([[1, 199]], tokens).attention
    inputs = inputs_of(plan, (1, tokens), torch.bfloat16)
    (expected,) = call("triton", inputs, plan)
    storage = torch.from_numpy(np.empty(tokens * stride, dtype=np.int16)).view(torch.bfloat16)
    far = {}
    for at, (name, x) in enumerate(inputs.items()):
        size = (stride * tokens, stride, 32, 1)
        far[name] = storage[at * 4096 :].as_strided(x.shape, size).copy_(x)
    (found,) = call("triton", far, plan)
    assert torch.equal(found, expected)


def refused(x: Mapping[str, Tensor], message: str) -> None:
    plan = packed([[4]], 4).attention
    with pytest.raises(ValueError, match=rf"kernels\.attention: triton {message}"):
        call("triton", x, plan)


def test_shapes_and_types_it_cannot_do_are_refused() -> None:
    refused({n: torch.zeros(1, 4, 2, 48) for n in "qkv"}, "takes head dims .* not 48")
    refused({n: torch.zeros(1, 4, 2, 256) for n in "qkv"}, "takes head dims .* not 256")
    doubles = {n: torch.zeros(1, 4, 2, 32, dtype=torch.float64) for n in "qkv"}
    refused(doubles, "takes fp32 and bf16")


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    refused({n: torch.zeros(1, 4, 2, 32) for n in "qkv"}, "needs a GPU")
