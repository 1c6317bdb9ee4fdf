"""Each bug planted in the expert MLP's Triton kernels is caught by what the suite compares, or by
the checks of the interpreter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels import triton_kernels as programs
from zaya_kernels.grouped_mlp import triton as host
from zaya_kernels.grouped_mlp import triton_kernels as kernels
from zaya_kernels.grouped_mlp.op import grouped_mlp
from zaya_kernels.grouped_mlp.types import MainGradients

from ..helpers.kernels import Passed, assert_close, random, run_pass
from ..helpers.mutation import assert_caught, of_kernels, plant
from .test_triton_grouped_mlp import call, inputs_of, small_tiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["small_tiles"]
pytestmark = pytest.mark.usefixtures("interpreter", "small_tiles")

COUNTS = [17, 0, 3]
HIDDEN, WIDTH = 40, 36


def exact_pass(inputs: Mapping[str, Tensor]) -> Passed:
    wide = {name: x.double() for name, x in inputs.items()}
    return run_pass(lambda b, x: call(COUNTS, b, x), "reference", wide)


def check() -> None:
    inputs = inputs_of(COUNTS, torch.float32, HIDDEN, WIDTH)
    found = run_pass(lambda b, x: call(COUNTS, b, x), "triton", inputs)
    assert_close(found, exact_pass(inputs), 4e-6)


def check_sums() -> None:
    """The pre-activation made again, and weights' gradients added to sums."""
    inputs = inputs_of(COUNTS, torch.float32, HIDDEN, WIDTH)
    weights = {name: inputs[name] for name in ("gate_up", "down")}
    before = {n: random(*x.shape, seed=7, dtype=torch.float32) for n, x in weights.items()}
    sums = {name: x.clone() for name, x in before.items()}
    counts, main = torch.tensor(COUNTS), MainGradients(**sums)

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        rows, gate_up, down = x["rows"], weights["gate_up"], weights["down"]
        return [grouped_mlp(rows, counts, gate_up, down, backend, recompute=True, main=main)]

    found = run_pass(run, "triton", {"rows": inputs["rows"]})
    added = {name: sums[name] - before[name] for name in sums}
    assert_close(Passed(found.outputs, found.gradients | added), exact_pass(inputs), 4e-6)


BUGS = {
    "grouped_mlp_plan": {
        "an expert's last tile forgotten": ("= (b_counts + BM - 1) // BM", "= b_counts // BM"),
        "tiles of the expert before": ("before = o_e < i", "before = o_e < i - 1"),
        "rows to the end of all rows": (
            "p_tile + 2, count - o_row", "p_tile + 2, count - o_row + 3",
        ),
    },
    "grouped_mlp_up": {
        "a group's last rows left out": ("tl.minimum(rows - first, GROUP)", "GROUP"),
        "sigmoid of the negative": ("x * -1.4426950408889634", "x * 1.4426950408889634"),
        "up where gate is": ("p_up = p_gate + F * D", "p_up = p_gate"),
    },
    "grouped_mlp_up_again": {
        "up where gate is": ("p_up = p_gate + F * D", "p_up = p_gate"),
        "pre-activation not kept": ("D, F, True, False, GROUP", "D, F, False, False, GROUP"),
    },
    "grouped_mlp_grad_down": {
        "edge of a matrix read beyond": ("return tl.minimum(o_n, N - 1)", "return o_n"),
        "gradients in another's place": ("tl.cast(expert, tl.int64) * (M * N)", "expert * 0"),
    },
    "grouped_mlp_grad_rows": {
        "edge of whole eights read beyond": (
            "tl.multiple_of(o_n % N, 8)", "tl.multiple_of(o_n, 8)",
        ),
        "rows of a matrix another's step apart": ("(o_k * step)[:, None]", "(o_k * K)[:, None]"),
        "last step of a sum left out": ("if K % BK:", "if K % BK == 0:"),
        "another expert's weights": ("matrices + expert * (N * K)", "matrices + expert * 0"),
    },
    "grouped_mlp_down": {
        "edge of a tile stored": ("if N % TILE:", "if N % TILE == 0:"),
        "another expert's weights": ("matrices + expert * (N * K)", "matrices + expert * 0"),
    },
    "grouped_mlp_grad_hidden": {
        "slope of silu left out": ("(acc * b_up * slope)", "(acc * b_up)"),
        "gradient of up with up": ("(acc * b_silu).to", "(acc * b_up).to"),
        "parts changed over": ("b_0, b_1 = _halves(b_left", "b_1, b_0 = _halves(b_left"),
    },
    "grouped_mlp_grad_gate_up": {
        "rows of the next expert summed": ("m_k = o_k < count % BK", "m_k = o_k < BK"),
        "first row of another expert": (
            "row = tl.load(offsets + expert)", "row = tl.load(offsets)",
        ),
    },
}  # fmt: skip


SUMS_BUGS = {
    "grouped_mlp_grad_gate_up": {
        "sums overwritten": ("acc += tl.load(p_out + o", "acc += 0 * tl.load(p_out + o"),
        "parts changed over": ("b_0, b_1 = _halves(b_left", "b_1, b_0 = _halves(b_left"),
    },
    "grouped_mlp_grad_down": {
        "sums overwritten": ("acc += tl.load(p_out + o", "acc += 0 * tl.load(p_out + o"),
        "a part in another's place": ("first + 3 * PART", "first + 2 * PART"),
    },
}


@of_kernels(BUGS, nightly=True)
def test_a_bug_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(BUGS[kernel][bug], kernels, (host, [kernel]), tmp_path, monkeypatch)
    assert_caught(check_sums if kernel == "grouped_mlp_up_again" else check)


@of_kernels(SUMS_BUGS)
def test_a_bug_in_sums_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(SUMS_BUGS[kernel][bug], kernels, (host, [kernel]), tmp_path, monkeypatch)
    assert_caught(check_sums)


def test_work_dealt_twice_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = ("tl.minimum(chiplet, programs % XCDS)", "0")
    plant(change, programs, (kernels, ["on_chiplets"]), tmp_path, monkeypatch)
    assert_caught(check)


def test_without_a_bug_nothing_is_caught() -> None:
    check()
    check_sums()
