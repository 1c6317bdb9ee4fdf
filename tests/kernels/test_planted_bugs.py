"""Each bug planted in a Triton kernel is caught by what the suite compares, or by the checks of the
interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.cca import triton as cca_host
from zaya_kernels.cca import triton_backward as cca_backward
from zaya_kernels.cca import triton_kernels as cca_forward
from zaya_kernels.launch import COMPUTE_UNITS, INTERPRETED
from zaya_kernels.norm_residual import triton as norm_residual

from ..helpers.kernels import Passed, assert_close, run_pass
from ..helpers.mutation import assert_caught, of_kernels, plant
from .test_cca import Shape, call, preceding
from .test_triton_cca import context_of, inputs_of
from .test_triton_norm_residual import fused
from .test_triton_norm_residual import inputs_of as norm_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("interpreter")

TOKENS = 70
DOCUMENTS = [[1, 33, 2, 34]]


@pytest.fixture(autouse=True)
def several_programs(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CCA's backward: three for a key's four blocks, two for a query's."""
    monkeypatch.setitem(COMPUTE_UNITS, INTERPRETED, 8)


def check_cca() -> None:
    """Two chunks with halos, the first longer than a backward block; inputs are slices."""
    shape = Shape(query_heads=2, kv_heads=1, head_dim=32, rotated=16)
    inputs = inputs_of(shape, torch.float32, TOKENS)
    whole = context_of(shape, DOCUMENTS, TOKENS)

    def chunked(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        names = ("qk", "v_now", "v_delayed")
        joint = torch.cat([x[name] for name in names], dim=-1)
        parts = torch.split(joint, [x[name].shape[-1] for name in names], dim=-1)
        context = replace(
            whole,
            halo_qk=preceding(x["qk"], (0, 35), shape.halo),
            halo_v=preceding(x["v_delayed"], (0, 35), 1),
        )
        return call(backend, {**x, **dict(zip(names, parts, strict=True))}, context)

    compare(chunked, lambda backend, x: call(backend, x, whole), inputs, 4e-6)


def check_norm_residual() -> None:
    compare(fused, fused, norm_inputs((1, 5, 100), torch.float32), 4e-6)


def compare(run: Any, plain: Any, inputs: Mapping[str, Tensor], tolerance: float) -> None:
    exact: Passed = run_pass(plain, "reference", {n: x.double() for n, x in inputs.items()})
    assert_close(run_pass(run, "triton", inputs), exact, tolerance)


CCA_BUGS = {
    "cca_forward": {
        "mask of a tap ignores documents": ("position >= back, first", "position >= 0, first"),
        "taps off by one": ("o_r + (TAPS - 1 - back)", "o_r + (TAPS - back)"),
        "halo off by one": ("tl.maximum(row + TAPS - 1, 0)\n", "tl.maximum(row, 0)\n"),
        "row stride of another tensor": ("qk + o_back * stride_row", "qk + o_back * C"),
        "queries stored with the keys' stride": ("o_r * (H * D), o_a", "o_r * (K * D), o_a"),
        "rotation the wrong way": (
            "turned = a * b_cos - b * b_sin", "turned = a * b_cos + b * b_sin",
        ),
        "value of the token itself": (
            "late = (o_c >= WIDTH) & (position > 0)", "late = o_c >= WIDTH",
        ),
        "last block unmasked": ("(first + o_r < length)\n", "(first + o_r <= length)\n"),
    },
}  # fmt: skip

CCA_BACKWARD_BUGS = {
    "cca_backward": {
        "document ignored in what is made again": (
            "position >= back, first", "position >= 0, first",
        ),
        "document ignored for the weights": ("m_r = position >= back", "m_r = position >= 0"),
        "document ignored for the rows": ("+ back) & (position >= back)", "+ back)"),
        "gradient moved one row short": ("(o_t == o_r + back)", "(o_t == o_r + back - back // 2)"),
        "rotated back the wrong way": ("tl.where(o_c < HALF, b_sin, -b_sin)", "b_sin"),
        "blocks overlap": ("m = (o_r < T - (TAPS - 1)) & (row >= 0)", "m = (row >= 0)"),
        "rows counted twice": ("m_own = o_r < ROWS", "m_own = o_r < T"),
        "gradient of a mean left out": ("is_own | is_key, 0.5, 0.5 / G", "is_own, 0.5, 0.0"),
        "another query's gradient": ("i_group * G + i, H + i_group)", "i_group * G, H + i_group)"),
        "floor of the norm without its gradient": ("dot * scale / (floor * floor)", "dot * 0.0"),
        "weights of the next delay": ("x, sums[delay], PARTS", "x, sums[0], PARTS"),
        "tap of another delay": ("inner[delay] * rows[back + delay]", "inner[delay] * rows[back]"),
        "late values of another token": ("o_next = (o_r + 1)", "o_next = (o_r + 0)"),
        "a block left out": (
            "range(i_split, blocks, splits)", "range(i_split, blocks - 1, splits)",
        ),
        "halo of another row": ("(row + TAPS - 1, 0) * C", "(row + TAPS - 2, 0) * C"),
    },
}  # fmt: skip

NORM_BUGS = {
    "norm_residual_backward": {
        "one row too few": ("(first + o_r < num_rows)", "(first + o_r < num_rows - 1)"),
        "two sums in one place": ("p_sums + 2 * step", "p_sums + step"),
        "pull along the row left out": ("b_gn - b_n * b_mean", "b_gn"),
    },
    "norm_residual_forward": {
        "mean over the padded columns": ("/ D + eps", "/ COLUMNS + eps"),
        "rows a padded stride apart": ("tl.int64) * D + (o_r", "tl.int64) * COLUMNS + (o_r"),
    },
}  # fmt: skip


@of_kernels(CCA_BUGS)
def test_a_bug_in_cca_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(CCA_BUGS[kernel][bug], cca_forward, (cca_host, [kernel]), tmp_path, monkeypatch)
    assert_caught(check_cca)


@of_kernels(CCA_BACKWARD_BUGS)
def test_a_bug_in_the_backward_of_cca_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = CCA_BACKWARD_BUGS[kernel][bug]
    plant(change, cca_backward, (cca_host, [kernel]), tmp_path, monkeypatch)
    assert_caught(check_cca)


@of_kernels(NORM_BUGS)
def test_a_bug_in_norm_residual_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = (norm_residual, [kernel])
    plant(NORM_BUGS[kernel][bug], norm_residual, places, tmp_path, monkeypatch)
    assert_caught(check_norm_residual)


def test_without_a_bug_nothing_is_caught() -> None:
    check_cca()
    check_norm_residual()
