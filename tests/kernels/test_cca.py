from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.cca.op import CCAContext, CCAWeights, Projections, cca

from zaya_train.model.rope import rotary_tables

from ..helpers.kernels import (
    assert_backends_agree,
    assert_close,
    assert_low_precision,
    random,
    run_pass,
)
from ..helpers.models import packed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..helpers.kernels import Run

SEQUENCE = 12
DOCUMENTS = [[5, 1, 4], [1, 1, 2, 8]]


@dataclass(frozen=True)
class Shape:
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    taps: tuple[int, int] = (2, 2)
    rotated: int = 4

    @property
    def channels(self) -> int:
        return (self.query_heads + self.kv_heads) * self.head_dim

    @property
    def halo(self) -> int:
        return sum(self.taps) - 2


SHAPES = [Shape(taps=(a, b)) for a in (1, 2, 3, 4) for b in (1, 2, 4)] + [
    Shape(query_heads=3, kv_heads=1, head_dim=6, rotated=6),
    Shape(query_heads=3, kv_heads=3, head_dim=10, rotated=2, taps=(3, 2)),
]


def inputs_of(shape: Shape, batch: int = 2) -> dict[str, Tensor]:
    channels, values = shape.channels, shape.kv_heads * shape.head_dim // 2
    heads, d = shape.query_heads + shape.kv_heads, shape.head_dim
    return {
        "qk": random(batch, SEQUENCE, channels, seed=1),
        "v_now": random(batch, SEQUENCE, values, seed=2),
        "v_delayed": random(batch, SEQUENCE, values, seed=3),
        "depthwise": random(channels, shape.taps[0], seed=4),
        "depthwise_bias": random(channels, seed=5),
        "grouped": random(heads, d, d * shape.taps[1], seed=6) / d**0.5,
        "grouped_bias": random(channels, seed=7),
        "temperature": random(shape.kv_heads, seed=8),
    }


def context_of(shape: Shape, documents: Sequence[Sequence[int]]) -> CCAContext:
    positions = packed(documents, SEQUENCE).positions
    cos, sin = rotary_tables(positions, 10_000.0, shape.rotated)
    return CCAContext(shape.query_heads, positions, cos, sin, halo_qk=None, halo_v=None)


def call(backend: str, tensors: Mapping[str, Tensor], context: CCAContext) -> Sequence[Tensor]:
    inputs = Projections(tensors["qk"], tensors["v_now"], tensors["v_delayed"])
    weights = CCAWeights(*(tensors[name] for name in CCAWeights.__dataclass_fields__))
    return cca(inputs, weights, context, backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_equals_reference(shape: Shape) -> None:
    context = context_of(shape, DOCUMENTS)
    assert_backends_agree(lambda backend, x: call(backend, x, context), inputs_of(shape))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_rows_shorter_than_the_taps(length: int) -> None:
    shape = Shape(taps=(4, 4))
    inputs = inputs_of(shape)
    for name in ("qk", "v_now", "v_delayed"):
        inputs[name] = inputs[name][:, :length]
    positions = packed([[length], [1] * length], length).positions
    cos, sin = rotary_tables(positions, 10_000.0, shape.rotated)
    context = CCAContext(shape.query_heads, positions, cos, sin, None, None)
    assert_backends_agree(lambda backend, x: call(backend, x, context), inputs)


def test_bf16_inputs_keep_bf16_accuracy() -> None:
    shape = Shape()
    context = context_of(shape, DOCUMENTS)
    assert_low_precision(
        lambda backend, x: call(backend, x, context), inputs_of(shape), torch.bfloat16, 2**-6
    )


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_queries_and_keys_have_the_norm_the_paper_says(backend: str) -> None:
    shape, inputs = Shape(), inputs_of(Shape())
    q, k, _ = call(backend, inputs, context_of(shape, DOCUMENTS))
    root = shape.head_dim**0.5
    torch.testing.assert_close(q.norm(dim=-1), torch.full_like(q[..., 0], root))
    expected = root * inputs["temperature"].abs().expand_as(k[..., 0])
    torch.testing.assert_close(k.norm(dim=-1), expected)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_silent_tokens_stay_finite(backend: str) -> None:
    shape, context = Shape(), context_of(Shape(), DOCUMENTS)
    inputs = {name: torch.zeros_like(value) for name, value in inputs_of(shape).items()}
    passed = run_pass(lambda name, x: call(name, x, context), backend, inputs)
    assert all(torch.isfinite(t).all() for t in [*passed.outputs, *passed.gradients.values()])


def preceding(x: Tensor, starts: Sequence[int], rows: int) -> Tensor:
    """[B, S, C] -> [B, n, rows, C]: what stands before each start, zeros before the row."""
    padded = torch.nn.functional.pad(x, (0, 0, rows, 0))
    return torch.stack([padded[:, start : start + rows] for start in starts], dim=1)


def in_chunks(shape: Shape, whole: CCAContext, starts: Sequence[int]) -> Run:
    """CCA on the chunks of equal length that begin at `starts`, in that order and with the halos
    before them; its outputs in the order of the whole row."""
    length = whole.positions.shape[1] // len(starts)
    order = torch.cat([torch.arange(start, start + length) for start in starts])

    def chunked(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        context = replace(
            whole,
            positions=whole.positions[:, order],
            cos=whole.cos[:, order],
            sin=whole.sin[:, order],
            halo_qk=preceding(x["qk"], starts, shape.halo + 1),
            halo_v=preceding(x["v_delayed"], starts, 1),
        )
        local = {
            key: value[:, order] if key in ("qk", "v_now", "v_delayed") else value
            for key, value in x.items()
        }
        return [out[:, order.argsort()] for out in call(name, local, context)]

    return chunked


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("taps", [(2, 2), (1, 1), (4, 3), (1, 3)])
@pytest.mark.parametrize("starts", [(0, 6), (6, 0), (0, 3, 6, 9), (9, 0, 6, 3)], ids=str)
def test_chunks_with_halos_equal_the_whole_row(
    backend: str, taps: tuple[int, int], starts: tuple[int, ...]
) -> None:
    """Cut inside a document, at its end, and one token after its start; gradients through halos."""
    shape = Shape(taps=taps)
    inputs = inputs_of(shape, batch=3)
    whole = context_of(shape, [[5, 1, 4], [6, 6], [2, 5, 5]])
    expected = run_pass(lambda name, x: call(name, x, whole), "reference", inputs)
    assert_close(run_pass(in_chunks(shape, whole, starts), backend, inputs), expected, 1e-10)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_halo_of_another_document_is_not_seen(backend: str) -> None:
    shape, inputs = Shape(taps=(4, 4)), inputs_of(Shape(taps=(4, 4)))
    context = context_of(shape, [[6, 6], [6, 6]])
    values = shape.kv_heads * shape.head_dim // 2

    def outputs(seed: int) -> Sequence[Tensor]:
        halo = random(2, 2, shape.halo, shape.channels, seed=seed) * 1e6
        halos = replace(context, halo_qk=halo, halo_v=random(2, 2, 1, values, seed=seed))
        return call(backend, inputs, halos)

    for a, b in zip(outputs(20), outputs(21), strict=True):
        assert torch.equal(a, b)


def test_unknown_back_end_is_refused() -> None:
    shape = Shape()
    with pytest.raises(ValueError, match=r"kernels\.cca: no back end 'cuda'; choose from eager"):
        call("cuda", inputs_of(shape), context_of(shape, DOCUMENTS))
