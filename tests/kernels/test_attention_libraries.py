"""Segments as calls of a library's varlen kernel, proved without the libraries.

The kernel's contract (packed runs, causality aligned to the bottom right) is written down here as
one dense matrix of scores over everything in a call; what the calls give is compared with
attention by its definition.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from zaya_kernels.attention import libraries, op
from zaya_kernels.attention.op import attention
from zaya_kernels.attention.segments import Segment, plan_attention

from zaya_train.config.schema import KernelsConfig
from zaya_train.model import SequenceLayout

from ..helpers.kernels import assert_close, assert_no_worse, random, run_pass
from ..helpers.models import CPU, TINY, packed, random_model, with_kernels
from ..helpers.mutation import mutated
from .test_attention import CHUNKS, LAYOUTS, call, dense, inputs_of, sees

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from zaya_kernels.attention.segments import AttentionPlan


def runs_of(ends: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Of every packed token the number of its run, and how many of the run come after it."""
    assert ends.dtype == torch.int32 and ends[0] == 0 and int(ends[-1]) == tokens
    place = torch.arange(tokens)
    run = torch.searchsorted(ends[1:].long(), place, right=True)
    return run, ends[1:].long()[run] - place


def varlen(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    """The contract: q [Q, H, d], k and v [L, K, d]."""
    assert options == {"causal": True, "deterministic": True}
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    of_query, after_query = runs_of(cu_seqlens_q, q.shape[0])
    of_key, after_key = runs_of(cu_seqlens_k, k.shape[0])
    visible = (of_query[:, None] == of_key) & (after_query[:, None] <= after_key)
    x = {"q": q[None], "k": k[None], "v": v[None]}
    return dense(x, visible[None])[0][0]


def by_calls(
    x: Mapping[str, Tensor], plan: AttentionPlan, how: Any = libraries
) -> Sequence[Tensor]:
    return [how.by_calls(varlen, x["q"], x["k"], x["v"], plan)]


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_documents_are_one_call(name: str, heads: tuple[int, int]) -> None:
    documents, row_tokens = LAYOUTS[name]
    plan = packed(documents, row_tokens).attention
    assert len(libraries.calls_of(plan.segments)) == 1
    inputs = inputs_of(len(documents), row_tokens, row_tokens, heads)
    mask = sees(documents, row_tokens)
    expected = run_pass(lambda _, x: dense(x, mask), "dense", inputs)
    assert_close(run_pass(lambda _, x: by_calls(x, plan), "calls", inputs), expected, 1e-10)


def call_on(plan: AttentionPlan, backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return call(backend, x, plan)


def check_chunks(name: str, documents: Sequence[Sequence[int]], how: Any = libraries) -> None:
    chunks = CHUNKS[name]
    local = torch.cat([torch.arange(start, end) for start, end in chunks])
    plan = SequenceLayout.of_documents(documents, 32, CPU, chunks).attention
    inputs = inputs_of(2, len(local), 32, (4, 2))
    mask = sees(documents, 32)[:, local]
    expected = run_pass(lambda _, x: dense(x, mask), "dense", inputs)
    assert_close(run_pass(lambda _, x: by_calls(x, plan, how), "calls", inputs), expected, 1e-10)


ROWS = ([[32], [9, 23]], [[8, 1, 15, 8], [7, 2, 14]])


@pytest.mark.parametrize("documents", ROWS, ids=str)
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_of_a_context_parallel_rank(name: str, documents: Sequence[Sequence[int]]) -> None:
    """Head-tail chunks too; a document in both of them has its keys read twice."""
    check_chunks(name, documents)


def test_keys_that_go_on_are_one_call() -> None:
    documents, chunks = [[8, 1, 15, 8], [7, 2, 14, 9]], [(0, 8), (24, 32)]
    plan = SequenceLayout.of_documents(documents, 32, CPU, chunks).attention
    calls = libraries.calls_of(plan.segments)
    # The second row's keys begin where those of the first row's last chunk end.
    assert [(c.queries, c.keys) for c in calls] == [
        ((0, 8), (0, 8)), ((8, 24), (24, 40)), ((24, 32), (55, 64)),
    ]  # fmt: skip
    assert calls[1].query_counts.tolist() == [8, 7, 1] and calls[2].key_counts.tolist() == [9]


def test_segments_without_queries_are_in_no_call() -> None:
    segments = [Segment(0, 3, 0, 3), Segment(3, 0, 3, 5), Segment(3, 4, 8, 4)]
    plan = plan_attention(segments, 7, CPU, whole_rows=False)
    calls = libraries.calls_of(plan.segments)
    assert [(c.queries, c.keys) for c in calls] == [((0, 3), (0, 3)), ((3, 7), (8, 12))]


def test_a_model_takes_them_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of a model with `kernels.attention=flash_attn`, the contract's kernel in
    its place."""
    monkeypatch.setitem(op.BACKENDS, "flash_attn", partial(libraries.by_calls, varlen))
    model = random_model(replace(TINY, num_layers=2))
    other = with_kernels(model, KernelsConfig(attention="flash_attn"))
    tokens = torch.arange(26).view(2, 13) * 7 % TINY.vocab_size
    layout = packed([[5, 1, 7], [1, 11]], 13)
    losses = [which(tokens, tokens, layout).loss for which in (model, other)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        torch.autograd.backward(loss)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    for mine, theirs in ((a.grad, b.grad) for a, b in pairs):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert float((theirs - mine).norm()) <= 2e-4 * float(mine.norm()) + 1e-6


def test_what_they_cannot_compute_is_refused() -> None:
    plan = packed([[8]], 8).attention
    for name in ("flash_attn", "aiter"):
        for x, said in (
            (random(1, 8, 2, 4, seed=1), "takes bf16 and fp16, not torch.float64"),
            (random(1, 8, 2, 4, seed=1).bfloat16(), "needs a GPU, the tensors are on cpu"),
            (torch.empty(1, 8, 2, 4, dtype=torch.bfloat16, device="meta"), "needs a GPU"),
        ):
            with pytest.raises(ValueError, match=rf"kernels\.attention: {name}") as caught:
                attention(x, x, x, plan, name)
            assert said in str(caught.value)


@pytest.mark.parametrize("size", [12, 264])
def test_head_dims_are_refused(size: int) -> None:
    class OnAGpu:
        dtype, device, shape = torch.bfloat16, torch.device("cuda"), (1, 8, 2, size)

    with pytest.raises(ValueError, match=f"multiples of 8 up to 256, not {size}"):
        libraries._check("aiter", OnAGpu())  # type: ignore[arg-type]


BUGS = {
    "keys need not go on": ("key_starts[1:] != key_ends[:-1]", "key_starts[1:] < key_ends[:-1]"),
    "segments as they come": ("segments[segments[:, 0].argsort()]", "segments.flip(0)"),
    "keys without the last ones": ("int(key_ends[last - 1])", "int(key_ends[last - 1] - 1)"),
    "keys of the first run only": ("key_counts[first:last]", "key_counts[first:last].clamp(max=7)"),
    "gradients of overlaps overwritten": ("full[start:end] += grad", "full[start:end] = grad"),
    "ends without the first": ("(1, 0)", "(0, 1)"),
    "longest of the queries": ("int(call.key_counts.max())", "int(call.query_counts.max())"),
    "not causal": ("causal=True", "causal=False"),
    "sums in any order": ("deterministic=True", "deterministic=False"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug: str, tmp_path: Path) -> None:
    planted = mutated(libraries, *BUGS[bug], tmp_path)
    with pytest.raises((AssertionError, RuntimeError)):
        for name in ("zigzag", "tail", "reversed"):
            for documents in ROWS:
                check_chunks(name, documents, planted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn", "aiter"])
def test_the_library_itself(name: str) -> None:
    """On packed documents and on head-tail chunks, beside sdpa; two runs agree bitwise."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    for chunks in ([(0, 512)], [(0, 128), (384, 512)]):
        plan = SequenceLayout.of_documents([[200, 1, 311]], 512, device, chunks).attention
        tokens = sum(end - start for start, end in chunks)
        sizes = {"q": (tokens, 4), "k": (512, 2), "v": (512, 2)}
        inputs = {
            key: random(1, rows, heads, 64, seed=i).to(device, torch.bfloat16)
            for i, (key, (rows, heads)) in enumerate(sizes.items())
        }
        run = partial(call_on, plan)
        assert_no_worse(run, inputs, name, slack=1.5)
