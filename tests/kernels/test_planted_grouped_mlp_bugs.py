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

from ..helpers.kernels import assert_close, run_pass
from ..helpers.mutation import assert_caught, plant, some_often
from .test_triton_grouped_mlp import call, inputs_of, small_tiles

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["small_tiles"]
pytestmark = pytest.mark.usefixtures("interpreter", "small_tiles")

COUNTS = [17, 0, 3]
HIDDEN, WIDTH = 40, 36
NAMES = [name for name in vars(host) if name.startswith("grouped_mlp_") and hasattr(kernels, name)]


def check() -> None:
    inputs = inputs_of(COUNTS, torch.float32, HIDDEN, WIDTH)
    exact = run_pass(
        lambda b, x: call(COUNTS, b, x), "reference", {n: x.double() for n, x in inputs.items()}
    )
    assert_close(run_pass(lambda b, x: call(COUNTS, b, x), "triton", inputs), exact, 4e-6)


BUGS = {
    "an expert's last tile forgotten": ("= (b_counts + BM - 1) // BM", "= b_counts // BM"),
    "tiles of the expert before": ("before = o_e < i", "before = o_e < i - 1"),
    "rows to the end of all rows": ("p_tile + 2, count - o_row", "p_tile + 2, count - o_row + 3"),
    "a group's last rows left out": ("tl.minimum(rows - first, GROUP)", "GROUP"),
    "edge of a matrix read beyond": ("o_n = tl.minimum(o_n, N - 1)", "o_n = o_n"),
    "last step of a sum left out": ("if K % BK:", "if K % BK == 0:"),
    "sigmoid of the negative": ("x * -1.4426950408889634", "x * 1.4426950408889634"),
    "up where gate is": ("p_up = p_gate + F * D", "p_up = p_gate"),
    "edge of a tile stored": ("if N % TILE:", "if N % TILE == 0:"),
    "another expert's weights": ("matrices + expert * (N * K)", "matrices + expert * 0"),
    "slope of silu left out": ("(acc * b_up * slope)", "(acc * b_up)"),
    "gradient of up with up": ("(acc * b_silu).to", "(acc * b_up).to"),
    "parts changed over": ("b_0, b_1 = _halves(b_left", "b_1, b_0 = _halves(b_left"),
    "rows of the next expert summed": ("m_k = o_k < count % BK", "m_k = o_k < BK"),
    "first row of another expert": ("row = tl.load(offsets + expert)", "row = tl.load(offsets)"),
    "gradients in another's place": ("tl.cast(expert, tl.int64) * (M * N)", "expert * 0"),
}


QUICK = (
    "an expert's last tile forgotten",
    "rows to the end of all rows",
    "up where gate is",
    "another expert's weights",
    "slope of silu left out",
    "rows of the next expert summed",
)
"""The others take as long as they are many: nightly."""


@pytest.mark.parametrize("bug", some_often(BUGS, QUICK))
def test_a_bug_is_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(BUGS[bug], kernels, (host, NAMES), tmp_path, monkeypatch)
    assert_caught(check)


def test_work_dealt_twice_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = ("tl.minimum(chiplet, programs % XCDS)", "0")
    plant(change, programs, (kernels, ["on_chiplets"]), tmp_path, monkeypatch)
    assert_caught(check)


def test_without_a_bug_nothing_is_caught() -> None:
    check()
