"""An address of 32 bits planted in each operation's kernels is caught by `test_far_rows`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ..helpers.mutation import assert_caught, plant

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.attention import triton as attention_host
from zaya_kernels.attention import triton_kernels as attention_kernels
from zaya_kernels.cca import triton as cca_host
from zaya_kernels.cca import triton_kernels as cca_forward
from zaya_kernels.grouped_mlp import triton as mlp_host
from zaya_kernels.grouped_mlp import triton_kernels as mlp_kernels
from zaya_kernels.linear_cross_entropy import triton as loss_host
from zaya_kernels.linear_cross_entropy import triton_kernels as loss_kernels
from zaya_kernels.moe_permute import triton as permute_host
from zaya_kernels.moe_permute import triton_kernels as permute_kernels
from zaya_kernels.newton_schulz import triton as newton_host
from zaya_kernels.newton_schulz import triton_kernels as newton_kernels
from zaya_kernels.norm_residual import triton as norm_host
from zaya_kernels.router import triton as router_host
from zaya_kernels.router import triton_kernels as router_kernels

from .test_far_rows import CHECKS, far, int32_range, quick

__all__ = ["far", "quick"]

BUGS = {
    "norm_residual": (
        norm_host, norm_host, ("tl.cast(first, tl.int64) * D", "first * D"),
        ("norm_residual_forward", "norm_residual_backward"),
    ),
    "cca": (
        cca_host, cca_forward, ("(i_chunk % chunks).to(tl.int64)", "(i_chunk % chunks)"),
        ("cca_forward",),
    ),
    "attention": (
        attention_host, attention_kernels, ("tl.cast(token, tl.int64) * stride_q",
        "token * stride_q"), tuple(attention_host.CONFIGS),
    ),
    "router": (
        router_host, router_kernels, ("row = tl.cast(i_m * BM, tl.int64)", "row = i_m * BM"),
        ("router_product",),
    ),
    "moe_permute": (
        permute_host, permute_kernels, ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        ("permute_gather", "permute_scatter", "permute_scatter_backward"),
    ),
    "grouped_mlp": (
        mlp_host, mlp_kernels, ("row = tl.cast(tl.load(tiles + i_tile * 3 + 1), tl.int64)",
        "row = tl.load(tiles + i_tile * 3 + 1)"), ("grouped_mlp_up", "grouped_mlp_down"),
    ),
    "linear_cross_entropy": (
        loss_host, loss_kernels, ("tl.cast(i_n * BN, tl.int64) * D", "i_n * BN * D"),
        ("loss_scores",),
    ),
    "newton_schulz": (
        newton_host, newton_kernels, ("i_n = (number // tiles).to(tl.int64)",
        "i_n = number // tiles"), ("newton_schulz_symmetric", "newton_schulz_apply"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", CHECKS)
def test_an_address_of_32_bits_is_caught(
    op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, kernels, change, names = BUGS[op]
    plant(change, kernels, (host, names), tmp_path, monkeypatch)
    for name in names:
        getattr(host, name).fn.__globals__["range"] = int32_range
    assert_caught(CHECKS[op])
