"""Triton expert MLP, interpreted, against float64 and against eager torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.grouped_mlp.op import grouped_mlp
from zaya_kernels.grouped_mlp.types import MainGradients
from zaya_kernels.launch import CHIPLETS, INTERPRETED, Config, recording

from ..helpers.kernels import assert_bitwise, assert_no_worse, random, run_pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.grouped_mlp import triton as host
from zaya_kernels.workshop.interpreter import counting

pytestmark = pytest.mark.usefixtures("interpreter")

COUNTS = {
    "odd": [5, 1, 37, 2],
    "empty_ends": [0, 20, 0],
    "one_takes_all": [0, 35, 0, 0],
    "no_rows": [0, 0, 0],
    "whole_tiles": [32, 16],
}
SMALL = Config({"BM": 16, "BN": 32, "BK": 32}, num_warps=4)
HIDDEN, WIDTH = 48, 32


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles out of few numbers."""
    small = {INTERPRETED: SMALL}
    for name, parts in (("few", 2), ("many", 1), ("fp32", 1)):
        up = host._in_parts(small, gfx942=parts)
        monkeypatch.setitem(host.CONFIGS, name, host._table(up, small, small, small))


def inputs_of(
    counts: Sequence[int], dtype: torch.dtype, hidden: int = HIDDEN, width: int = WIDTH
) -> dict[str, Tensor]:
    experts = len(counts)
    made = {
        "rows": random(sum(counts), hidden, seed=1),
        "gate_up": random(experts, 2 * width, hidden, seed=2) / hidden**0.5,
        "down": random(experts, hidden, width, seed=3) / width**0.5,
    }
    return {name: value.to(dtype) for name, value in made.items()}


def call(
    counts: Sequence[int], backend: str, x: Mapping[str, Tensor], recompute: bool = False
) -> Sequence[Tensor]:
    sizes = torch.tensor(counts)
    again = recompute and backend == "triton"
    return [grouped_mlp(x["rows"], sizes, x["gate_up"], x["down"], backend, recompute=again)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("odd", torch.float32), *((name, torch.bfloat16) for name in COUNTS)],
    ids=str,
)
def test_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    counts = COUNTS[name]
    assert_no_worse(lambda b, x: call(counts, b, x), inputs_of(counts, dtype), "triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("hidden", "width"), [(37, 19), (32, 40)])
def test_odd_widths(hidden: int, width: int) -> None:
    """No side of a matrix is a multiple of a tile's."""
    inputs = inputs_of(COUNTS["odd"], torch.float32, hidden, width)
    assert_no_worse(lambda b, x: call(COUNTS["odd"], b, x), inputs, "triton")


@pytest.mark.parametrize("rows", [3, 600], ids=["few", "many"])
def test_the_shipped_tiles(rows: int) -> None:
    counts = [rows, 0]
    inputs = inputs_of(counts, torch.bfloat16)
    assert_no_worse(lambda b, x: call(counts, b, x), inputs, "triton")


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bitwise() -> None:
    counts = [17, 0, 3]
    assert_bitwise(lambda b, x: call(counts, b, x), inputs_of(counts, torch.bfloat16), "triton")


@pytest.mark.usefixtures("small_tiles")
def test_made_again_the_preactivation_is_the_same() -> None:
    counts = COUNTS["empty_ends"]
    inputs = inputs_of(counts, torch.bfloat16)
    kept, again = (
        run_pass(lambda b, x, r=r: call(counts, b, x, r), "triton", inputs)  # type: ignore[misc]
        for r in (False, True)
    )
    assert torch.equal(kept.outputs[0], again.outputs[0])
    for name, gradient in kept.gradients.items():
        assert torch.equal(gradient, again.gradients[name]), name


def saved_bytes(counts: Sequence[int], recompute: bool) -> int:
    """Bytes of what a forward pass keeps besides its inputs."""
    leaves = {n: x.requires_grad_(True) for n, x in inputs_of(counts, torch.bfloat16).items()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(counts, "triton", leaves, recompute)
    inputs = {x.data_ptr() for x in leaves.values()}
    return sum(size for at, size in kept.items() if at not in inputs)


@pytest.mark.usefixtures("small_tiles")
def test_the_preactivation_is_kept_or_not() -> None:
    counts = COUNTS["odd"]
    kept, again = (saved_bytes(counts, recompute) for recompute in (False, True))
    assert kept - again == sum(counts) * 2 * WIDTH * 2
    assert again < 4 * (len(counts) + 2 + 3 * (sum(counts) // 16 + len(counts))) + 1


@pytest.mark.usefixtures("small_tiles")
def test_main_gradients_are_added_to_in_fp32() -> None:
    counts = COUNTS["empty_ends"]
    inputs = inputs_of(counts, torch.bfloat16)
    exact = run_pass(
        lambda b, x: call(counts, b, x), "reference", {n: x.double() for n, x in inputs.items()}
    )
    leaves = {name: x.clone().requires_grad_(True) for name, x in inputs.items()}
    main = MainGradients(*(torch.ones(leaves[n].shape) for n in ("gate_up", "down")))
    out = grouped_mlp(
        leaves["rows"], torch.tensor(counts), leaves["gate_up"], leaves["down"], "triton", main=main
    )
    torch.autograd.backward(out, random(*out.shape, seed=100).to(out.dtype))
    assert leaves["gate_up"].grad is None and leaves["down"].grad is None
    assert leaves["rows"].grad is not None
    for name in ("gate_up", "down"):
        found = getattr(main, name) - 1
        expected = exact.gradients[name]
        # Inputs of the sums are rounded to bf16, the sums are not.
        assert float((found - expected).norm() / expected.norm()) < 2**-8
        assert (found[0] == 0).all() and (found[2] == 0).all(), "experts without rows"
        assert not torch.equal(found, found.bfloat16().float()), "rounded to bf16"


@pytest.mark.usefixtures("small_tiles")
def test_rows_of_no_expert_are_left_out() -> None:
    """Counts that sum to less than the rows: what lies behind is neither read nor written."""
    counts, spare = [5, 0, 18], 20
    inputs = inputs_of(counts, torch.float32)
    expected = run_pass(lambda b, x: call(counts, b, x), "triton", inputs)
    nothing = torch.full((spare, HIDDEN), float("nan"))

    def longer(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        rows = torch.cat([x["rows"], nothing])
        return [out[: sum(counts)] for out in call(counts, backend, {**x, "rows": rows})]

    found = run_pass(longer, "triton", inputs)
    assert torch.equal(found.outputs[0], expected.outputs[0])
    for name, gradient in expected.gradients.items():
        assert torch.equal(gradient, found.gradients[name]), name


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("chiplets", [1, 3])
def test_every_order_of_programs_computes_every_tile_once(
    chiplets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter refuses what two programs write; NaN is what none wrote."""
    monkeypatch.setitem(CHIPLETS, INTERPRETED, chiplets)
    monkeypatch.setattr(host, "GROUP", 3)
    counts = [5, 60, 0, 17]
    inputs = inputs_of(counts, torch.float32)
    assert_no_worse(lambda b, x: call(counts, b, x), inputs, "triton")


@pytest.mark.usefixtures("small_tiles")
def test_products_are_those_of_tiles_that_have_rows() -> None:
    counts = [5, 0, 37, 16]
    with counting() as found:
        run_pass(lambda b, x: call(counts, b, x), "triton", inputs_of(counts, torch.float32))
    tiled = sum(-(-count // 16) * 16 for count in counts)
    summed = sum(-(-count // 32) * 32 for count in counts)
    operations = {one.kernel.removeprefix("grouped_mlp_"): one.dot_operations for one in found}
    # Sides of 48 take two tiles of 32.
    assert operations == {
        "plan": 0,
        "up": 2 * tiled * 64 * 2 * 32,
        "down": 2 * tiled * 32 * 64,
        "grad_hidden": 2 * tiled * 64 * 32,
        "grad_rows": 2 * tiled * 64 * 64,
        "grad_gate_up": 2 * summed * 64 * 64,
        "grad_down": 2 * summed * 48 * 32,
    }


def test_counts_stay_on_the_device() -> None:
    """Recorded on `meta`, where reading a number is an error."""
    meta = torch.device("meta")
    rows, gate_up, down = (
        torch.empty(shape, device=meta, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((64, 32), (4, 32, 32), (4, 32, 16))
    )
    counts = torch.empty(4, dtype=torch.int64, device=meta)
    with recording("gfx942") as launches:
        out = grouped_mlp(rows, counts, gate_up, down, "triton")
        torch.autograd.backward(out, torch.empty_like(out))
    assert len(launches) == 7


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_only_triton_takes_its_settings(backend: str) -> None:
    x = inputs_of([2], torch.float32)
    with pytest.raises(ValueError, match=rf"kernels\.grouped_mlp: {backend} keeps"):
        grouped_mlp(x["rows"], torch.tensor([2]), x["gate_up"], x["down"], backend, recompute=True)


def test_tensors_of_two_types_and_narrow_main_gradients_are_refused() -> None:
    inputs = inputs_of([2], torch.bfloat16)
    with pytest.raises(ValueError, match=r"takes one type, not bfloat16 and float32"):
        call([2], "triton", {**inputs, "down": inputs["down"].float()})
    sums = MainGradients(*(torch.zeros_like(inputs[name]) for name in ("gate_up", "down")))
    with pytest.raises(ValueError, match=r"main gradients are contiguous and fp32"):
        grouped_mlp(
            inputs["rows"],
            torch.tensor([2]),
            inputs["gate_up"],
            inputs["down"],
            "triton",
            main=sums,
        )


def test_fp64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels\.grouped_mlp: triton takes fp32 and bf16"):
        call([2], "triton", inputs_of([2], torch.float64))
