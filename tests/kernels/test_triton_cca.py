"""Triton CCA, interpreted, against float64 and against eager torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.cca.op import CCAContext
from zaya_kernels.launch import ARCHITECTURES, COMPUTE_UNITS, INTERPRETED, recording

from zaya_train.model.rope import rotary_tables

from ..helpers.kernels import assert_bitwise, assert_close, assert_no_worse, random, run_pass
from ..helpers.models import packed
from .test_cca import Shape, call, in_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.cca.triton import program_splits, traffic
from zaya_kernels.workshop.interpreter import counting

pytestmark = pytest.mark.usefixtures("interpreter")

# Blocks hold 128 (forward) and 30 whole rows (backward), in fp32 64 and 14: several blocks, and an
# odd last one.
SEQUENCE = 141
DOCUMENTS = [[1, 1, 60, 2, 77]]
USUAL = Shape(query_heads=4, kv_heads=2, head_dim=32, rotated=16)
SHAPES = [
    USUAL,
    Shape(query_heads=1, kv_heads=1, head_dim=64, rotated=64, taps=(3, 2)),
    Shape(query_heads=2, kv_heads=1, head_dim=32, rotated=32, taps=(1, 1)),
]


@pytest.fixture(autouse=True)
def several_programs(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many units that a head has several programs, some of which walk over several blocks."""
    monkeypatch.setitem(COMPUTE_UNITS, INTERPRETED, 16)


def inputs_of(shape: Shape, dtype: torch.dtype, sequence: int = SEQUENCE) -> dict[str, Tensor]:
    channels, values = shape.channels, shape.kv_heads * shape.head_dim // 2
    heads, d = shape.query_heads + shape.kv_heads, shape.head_dim
    made = {
        "qk": random(1, sequence, channels, seed=1),
        "v_now": random(1, sequence, values, seed=2),
        "v_delayed": random(1, sequence, values, seed=3),
        "depthwise": random(channels, shape.taps[0], seed=4),
        "depthwise_bias": random(channels, seed=5),
        "grouped": random(heads, d, d * shape.taps[1], seed=6) / d**0.5,
        "grouped_bias": random(channels, seed=7),
        "temperature": random(shape.kv_heads, seed=8),
    }
    return {name: value.to(dtype) for name, value in made.items()}


def context_of(shape: Shape, documents: Sequence[Sequence[int]], sequence: int) -> CCAContext:
    positions = packed(documents, sequence).positions
    cos, sin = rotary_tables(positions, 10_000.0, shape.rotated)
    return CCAContext(shape.query_heads, positions, cos, sin, halo_qk=None, halo_v=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_as_exact_as_eager(shape: Shape, dtype: torch.dtype) -> None:
    context = context_of(shape, DOCUMENTS, SEQUENCE)
    assert_no_worse(lambda b, x: call(b, x, context), inputs_of(shape, dtype), "triton")


def test_traffic_is_what_the_kernels_move() -> None:
    """Rows at a document's start, whose predecessors are not read, are the only difference."""
    context = context_of(USUAL, [[SEQUENCE]], SEQUENCE)
    inputs = inputs_of(USUAL, torch.bfloat16)
    with counting() as counts:
        run_pass(lambda b, x: call(b, x, context), "triton", inputs)
    shape = (1, SEQUENCE, USUAL.query_heads, USUAL.kv_heads, USUAL.head_dim, USUAL.rotated)
    moved: dict[str, int] = {}
    for passing in traffic(shape, USUAL.taps, INTERPRETED):
        moved |= passing.by_kernel
    assert [count.kernel for count in counts] == list(moved)
    for count in counts:
        assert 0.995 * moved[count.kernel] <= count.distinct_bytes <= moved[count.kernel]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_traffic_is_near_the_fewest_possible(arch: str) -> None:
    forward, backward = traffic((8, 4096, 8, 2, 128, 64), (2, 2), arch)
    assert forward.ratio <= 1.02
    assert backward.ratio <= 1.3


def test_programs_share_the_products_evenly() -> None:
    """A key's block costs 28 products, a query's 16: 2 x 38 and 8 x 22 programs of 256 units."""
    assert program_splits(1093, 8, 2, (2, 2), "gfx950") == (38, 22)
    assert program_splits(3, 8, 2, (2, 2), "gfx950") == (3, 3)
    assert program_splits(1093, 400, 100, (2, 2), "gfx950") == (1, 1)


def test_two_runs_agree_bitwise() -> None:
    context = context_of(USUAL, [[20, 20]], 40)
    inputs = inputs_of(USUAL, torch.bfloat16, 40)
    assert_bitwise(lambda b, x: call(b, x, context), inputs, "triton")


@pytest.mark.parametrize(
    ("taps", "starts"), [((2, 2), (36, 0)), ((1, 1), (0, 36)), ((3, 2), (54, 18, 0, 36))], ids=str
)
def test_chunks_with_halos_equal_the_whole_row(
    taps: tuple[int, int], starts: tuple[int, ...]
) -> None:
    """Chunks out of order, cut inside a document, at its end, and one token after its start; the
    backward's blocks of 32 rows lie across them. Gradients flow through the halos."""
    shape = replace(USUAL, taps=taps)
    inputs = inputs_of(shape, torch.float32, 72)
    whole = context_of(shape, [[17, 18, 1, 17, 19]], 72)
    exact = {name: value.double() for name, value in inputs.items()}
    expected = run_pass(lambda name, x: call(name, x, whole), "reference", exact)
    assert_close(run_pass(in_chunks(shape, whole, starts), "triton", inputs), expected, 4e-6)


def test_slices_of_one_product_are_read_in_place() -> None:
    """The model hands over slices of its projections' joint output."""
    context = context_of(USUAL, [[20, 20]], 40)
    inputs = inputs_of(USUAL, torch.bfloat16, 40)
    names = ("qk", "v_now", "v_delayed")
    joint = torch.cat([inputs[name] for name in names], dim=-1)
    parts = torch.split(joint, [inputs[name].shape[-1] for name in names], dim=-1)
    sliced = {**inputs, **dict(zip(names, parts, strict=True))}
    for a, b in zip(call("triton", inputs, context), call("triton", sliced, context), strict=True):
        assert torch.equal(a, b)


def test_silent_tokens_stay_finite() -> None:
    context = context_of(USUAL, [[20, 20]], 40)
    inputs = {n: torch.zeros_like(x) for n, x in inputs_of(USUAL, torch.float32, 40).items()}
    passed = run_pass(lambda name, x: call(name, x, context), "triton", inputs)
    assert all(torch.isfinite(t).all() for t in [*passed.outputs, *passed.gradients.values()])


def test_fp32_is_refused_where_the_matrix_unit_takes_none() -> None:
    context = context_of(USUAL, [[4]], 4)
    with recording("sm_90"), pytest.raises(ValueError, match=r"kernels\.cca: triton .* on sm_90"):
        call("triton", inputs_of(USUAL, torch.float32, 4), context)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(head_dim=48, rotated=16), "powers of two from 32, not 48"),
        (Shape(head_dim=32, rotated=24), "a multiple of 16 channels, not 24"),
    ],
    ids=str,
)
def test_shapes_it_cannot_do_are_refused(shape: Shape, message: str) -> None:
    context = context_of(shape, [[4]], 4)
    with pytest.raises(ValueError, match=rf"kernels\.cca: triton takes .*{message}"):
        call("triton", inputs_of(shape, torch.float32, 4), context)
