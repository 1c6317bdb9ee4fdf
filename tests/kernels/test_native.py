"""The back end in C against float64 and against eager torch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from zaya_kernels import products
from zaya_kernels.cca.op import CCAContext
from zaya_kernels.grouped_mlp import op as grouped_mlp
from zaya_kernels.linear_cross_entropy import native as loss
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy
from zaya_kernels.native import library
from zaya_kernels.native.library import check
from zaya_kernels.native.product import multiply

from zaya_train.config.errors import ConfigError
from zaya_train.model import SequenceLayout
from zaya_train.model.rope import rotary_tables

from ..helpers.kernels import assert_bitwise, assert_no_worse, error, random
from ..helpers.models import CPU, packed
from . import test_attention, test_cca, test_grouped_mlp, test_linear_cross_entropy
from .test_attention import sees
from .test_cca import in_chunks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def rounded(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in inputs.items()}


# Odd everything; several panels and blocks of columns, tiles of rows of every height, blocks of
# sums.
@TYPES
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (37, 45, 33), (100, 70, 514), (20, 600, 7), (4, 600, 0), (0, 5, 3), (3, 0, 4)],
)
@pytest.mark.parametrize("turned", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
def test_products(sizes: tuple[int, int, int], turned: tuple[int, int], dtype: torch.dtype) -> None:
    m, n, k = sizes
    a = random(*((k, m) if turned[0] else (m, k)), seed=1, dtype=dtype)
    b = random(*((n, k) if turned[1] else (k, n)), seed=2, dtype=dtype)
    a, b = a.t() if turned[0] else a, b.t() if turned[1] else b
    exact = a.double() @ b.double()
    before = random(m, n + 3, seed=3, dtype=torch.float32)
    wide = before.clone()
    multiply(a, b, wide[:, :n], add=True)
    assert error(wide[:, :n], before[:, :n].double() + exact) <= 4e-7
    assert torch.equal(wide[:, n:], before[:, n:])
    # One rounding of the result, or the fp32 sums' own.
    allowed = max(torch.finfo(dtype).eps / 2, 4e-7)
    assert error(multiply(a, b, torch.empty(m, n, dtype=dtype)), exact) <= allowed


def test_products_in_bf16_are_rounded_once() -> None:
    """Sums of many steps stay fp32 until they are whole."""
    a, b = torch.ones(2, 4096).bfloat16(), torch.full((4096, 3), 1 / 256).bfloat16()
    a[:, 0] = 1024.0
    expected = torch.full((2, 3), 1024 / 256 + 4095 / 256).bfloat16()
    assert torch.equal(multiply(a, b, torch.empty(2, 3, dtype=torch.bfloat16)), expected)


SHAPES = [
    test_cca.Shape(query_heads=4, kv_heads=2, head_dim=32, rotated=16),
    test_cca.Shape(query_heads=3, kv_heads=1, head_dim=10, rotated=6, taps=(3, 2)),
    test_cca.Shape(query_heads=2, kv_heads=2, head_dim=16, rotated=16, taps=(1, 1)),
    test_cca.Shape(query_heads=4, kv_heads=4, head_dim=8, rotated=4, taps=(1, 4)),
]


def cca_case(
    shape: test_cca.Shape, documents: Sequence[Sequence[int]], tokens: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], CCAContext]:
    made = test_cca.inputs_of(shape, batch=len(documents))
    for i, name in enumerate(("qk", "v_now", "v_delayed")):
        made[name] = random(len(documents), tokens, made[name].shape[2], seed=20 + i)
    positions = packed(documents, tokens).positions
    cos, sin = rotary_tables(positions, 10_000.0, shape.rotated)
    context = CCAContext(shape.query_heads, positions, cos, sin, halo_qk=None, halo_v=None)
    return rounded(made, dtype), context


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cca_is_as_exact_as_eager(shape: test_cca.Shape, dtype: torch.dtype) -> None:
    """Three blocks of tokens, the last one odd, and more rows than parts of the weights' sums."""
    documents = [[1, 1, 60, 2, 77], [63, 1, 1, 76], [141], [140, 1], [2] * 70]
    inputs, context = cca_case(shape, documents, 141, dtype)
    assert_no_worse(lambda b, x: test_cca.call(b, x, context), inputs, "native")


@pytest.mark.parametrize("taps", [(2, 2), (1, 1), (4, 3), (1, 3)])
@pytest.mark.parametrize("starts", [(0, 70), (70, 0), (105, 0, 70, 35)], ids=str)
def test_cca_in_chunks_equals_the_whole_row(taps: tuple[int, int], starts: tuple[int, ...]) -> None:
    shape = replace(SHAPES[0], taps=taps)
    inputs, whole = cca_case(shape, [[69, 1, 70], [36, 104]], 140, torch.float32)
    chunks = in_chunks(shape, whole, starts)

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return chunks(name, x) if name == "native" else test_cca.call(name, x, whole)

    assert_no_worse(run, inputs, "native")


def test_cca_of_silence_is_finite_and_halos_of_others_are_not_seen() -> None:
    shape = SHAPES[0]
    inputs, context = cca_case(shape, [[6, 6]], 12, torch.float32)
    silent = {name: torch.zeros_like(x) for name, x in inputs.items()}
    assert_no_worse(lambda b, x: test_cca.call(b, x, context), silent, "native")
    # Below the floor of the norm, where the scale is a constant.
    faint = inputs | {name: silent[name] for name in ("depthwise_bias", "grouped_bias")}
    faint["qk"] = inputs["qk"] * 1e-10
    assert_no_worse(lambda b, x: test_cca.call(b, x, context), faint, "native")
    values = shape.kv_heads * shape.head_dim // 2
    halos = replace(
        context,
        halo_qk=torch.full((1, 2, shape.halo, shape.channels), float("nan")),
        halo_v=torch.zeros(1, 2, 1, values),
    )
    for out in test_cca.call("native", inputs, halos):
        assert torch.isfinite(out).all()


@TYPES
@pytest.mark.parametrize(("heads", "size"), [((8, 2), 64), ((3, 3), 10), ((3, 1), 128)], ids=str)
def test_attention_is_as_exact_as_torch(
    heads: tuple[int, int], size: int, dtype: torch.dtype
) -> None:
    """Blocks of keys and of queries whole, cut by the diagonal and odd; one-token documents."""
    documents = [[1, 1, 300, 2, 147], [451]]
    plan = packed(documents, 451).attention
    inputs = {
        name: random(2, 451, heads[name != "q"], size, seed=i, dtype=dtype)
        for i, name in enumerate("qkv")
    }
    # Of bf16, torch's own flash attention, which rounds where this one does; eager's blocks are
    # fp32 from rows of some length on.
    usual = "sdpa" if dtype == torch.bfloat16 else "eager"
    named = {"native": "native", "eager": usual, "reference": "reference"}
    assert_no_worse(lambda b, x: test_attention.call(named[b], x, plan), inputs, "native")


def test_attention_of_scores_of_any_size() -> None:
    """Exponentials overflow unless each row's largest score is found, wherever it stands. Rounding
    of scores of hundreds is most of the errors, by chance in either back end."""
    plan = packed([[36, 6]], 42).attention
    inputs = {name: random(1, 42, 4, 10, seed=i).float() for i, name in enumerate("qkv")}
    inputs["q"] *= 300
    inputs["k"][:, 32:36] *= 5
    assert_no_worse(lambda b, x: test_attention.call(b, x, plan), inputs, "native", slack=2)


@TYPES
@pytest.mark.parametrize(
    "chunks", [[(0, 40), (150, 180)], [(100, 180), (33, 34), (0, 33)]], ids=str
)
def test_attention_behind_keys(chunks: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Keys that one segment sees, that two see, and that none sees (zero gradient)."""
    plan = SequenceLayout.of_documents([[20, 150]], 180, CPU, chunks).attention
    queries = plan.inverse.numel()
    inputs = {
        name: random(1, length, count, 32, seed=i, dtype=dtype)
        for i, (name, length, count) in enumerate((("q", queries, 4), ("k", 180, 2), ("v", 180, 2)))
    }
    assert_no_worse(lambda b, x: test_attention.call(b, x, plan), inputs, "native")


def test_attention_follows_its_definition() -> None:
    documents = [[5, 1, 7], [1, 12]]
    plan, mask = packed(documents, 13).attention, sees(documents, 13)
    inputs = rounded(test_attention.inputs_of(2, 13, 13, (4, 2)), torch.float32)
    (expected,) = test_attention.dense({k: x.double() for k, x in inputs.items()}, mask)
    (found,) = test_attention.call("native", inputs, plan)
    assert error(found, expected) <= 1e-6


@TYPES
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "kept", "vocab"), [(1, 1, 1), (33, 33, 65), (70, 3, 2100)])
def test_loss_is_as_exact_as_eager(
    sizes: None, tokens: int, kept: int, vocab: int, z_loss: float, dtype: torch.dtype
) -> None:
    labels = test_linear_cross_entropy.labels_of(tokens, kept, vocab)
    inputs = {
        "hidden": random(tokens, 32, seed=1, dtype=dtype),
        "weight": (random(vocab, 32, seed=2) * 32**-0.5).to(dtype),
    }

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [linear_cross_entropy(x["hidden"], x["weight"], labels, name, z_loss)]

    assert_no_worse(run, inputs, "native")


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, so that the weight's gradient is a sum of several."""
    monkeypatch.setattr(loss, "chunk_rows", lambda classes, itemsize: 16)


def test_loss_without_supervision_and_of_large_logits() -> None:
    labels = test_linear_cross_entropy.labels_of(5, 0, 7)
    inputs = rounded(test_linear_cross_entropy.inputs_of(5, 7), torch.float32)
    leaves = [x.requires_grad_(True) for x in inputs.values()]
    (out,) = test_linear_cross_entropy.call(labels, "native", inputs)
    assert float(out.detach()) == 0.0
    assert all(float(g.abs().sum()) == 0.0 for g in torch.autograd.grad(out, leaves))
    # Exponentials overflow unless each row's largest is found, wherever it stands. Rounding of
    # logits of hundreds is most of the errors, by chance in either back end.
    wide = test_linear_cross_entropy.inputs_of(40, 70)
    large = {name: x.float() * 20 for name, x in wide.items()}
    large["weight"][-1] *= 20
    labels = test_linear_cross_entropy.labels_of(40, 40, 70)
    assert_no_worse(
        lambda b, x: test_linear_cross_entropy.call(labels, b, x), large, "native", slack=1.5
    )


@TYPES
@pytest.mark.parametrize("name", test_grouped_mlp.COUNTS)
@pytest.mark.parametrize("sizes", [(23, 37), (32, 48)], ids=str)
def test_experts_are_as_exact_as_eager(
    name: str, sizes: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 than by oneDNN, which sums in this order too; MKL has another for small matrices."""
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", 1)
    counts = test_grouped_mlp.COUNTS[name]
    inputs = rounded(test_grouped_mlp.inputs_of(counts, *sizes), dtype)
    # A single row is no matrix: oneDNN takes its product in parts along the sum.
    slack = 2.2 if sum(counts) == 1 else 1.1
    assert_no_worse(lambda b, x: test_grouped_mlp.call(counts, b, x), inputs, "native", slack)


def test_counts_that_are_no_rows_are_refused() -> None:
    inputs = rounded(test_grouped_mlp.inputs_of([2, 3]), torch.float32)
    with pytest.raises(ValueError, match="experts' counts sum to 6, of 5 rows"):
        test_grouped_mlp.call([2, 4], "native", inputs)
    with pytest.raises(ValueError, match=r"recompute and main gradients need triton"):
        grouped_mlp.grouped_mlp(
            inputs["rows"], torch.tensor([2, 3]), inputs["gate_up"], inputs["down"], "native",
            recompute=True,
        )  # fmt: skip


@TYPES
@pytest.mark.usefixtures("threads_restored")
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Of an operation with sums over rows (CCA) and of one with shared keys (attention)."""
    inputs, context = cca_case(SHAPES[0], [[70, 71]] * 5, 141, dtype)
    plan = SequenceLayout.of_documents([[180]], 180, CPU, [(0, 40), (150, 180)]).attention
    keys = {
        name: random(1, length, count, 32, seed=i, dtype=dtype)
        for i, (name, length, count) in enumerate((("q", 70, 4), ("k", 180, 2), ("v", 180, 2)))
    }

    def by_threads(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        torch.set_num_threads(threads.pop())
        return [*test_cca.call(name, x, context), *test_attention.call(name, x, plan)]

    threads = [1, 2]
    assert_bitwise(by_threads, {**inputs, **keys}, "native")


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ([torch.zeros(1, dtype=torch.float64)], "not float64 on cpu"),
        ([torch.zeros(1), torch.zeros(1).bfloat16()], "not bfloat16, float32 on cpu"),
        ([torch.zeros(1, device="meta")], "not float32 on meta"),
    ],
)
def test_other_types_are_refused(tensors: list[Tensor], told: str) -> None:
    with pytest.raises(ValueError, match=rf"kernels\.cca: native takes one type.*{told}"):
        check("cca", *tensors)


def test_without_a_compiler_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match="needs a C compiler, and cc, gcc or clang is not in"):
        library.compiler()
    monkeypatch.setenv("CC", "mycc")
    with pytest.raises(ConfigError, match="mycc is not in PATH; install one, name it in CC"):
        library.compiler()


def test_what_does_not_compile_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.c").write_text("int f(void) { return absent; }")
    target = tmp_path / "cache" / "native.so"
    with pytest.raises(ConfigError, match=r"native did not compile with cc: .*error.*absent"):
        library.build(target, ["cc"], tmp_path)
    assert list(target.parent.iterdir()) == []


def test_a_library_is_kept_for_its_text_and_its_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cc = library.compiler()
    first = library.path(cc)
    assert first.parent == tmp_path / "zaya-train"
    assert library.path(cc) == first
    monkeypatch.setattr(library, "_processor", lambda: "another")
    assert library.path(cc) != first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    changed = tmp_path / "changed"
    shutil.copytree(library.SOURCES, changed)
    (changed / "vectors.h").open("a").write("\n")
    monkeypatch.setattr(library, "SOURCES", changed)
    assert library.path(cc) != first


def test_rehearsals_count_memory_without_computing() -> None:
    with FakeTensorMode():
        rows = torch.zeros(6, 8, requires_grad=True)
        gate_up = torch.zeros(2, 10, 8, requires_grad=True)
        counts, down = torch.tensor([2, 4]), torch.zeros(2, 8, 5)
        out = grouped_mlp.grouped_mlp(rows, counts, gate_up, down, "native")
        gradients = torch.autograd.grad(out.sum(), [rows, gate_up])
    assert [g.shape for g in gradients] == [rows.shape, gate_up.shape]
