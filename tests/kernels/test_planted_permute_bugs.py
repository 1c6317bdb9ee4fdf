"""Each bug planted in the permutation's Triton kernels is caught by what the suite compares, or by
the checks of the interpreter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.moe_permute import triton as host
from zaya_kernels.moe_permute import triton_kernels as kernels

from ..helpers.kernels import assert_close, run_pass
from ..helpers.mutation import assert_caught, of_kernels, plant, shrink
from ..helpers.permutation import inputs_of, ordered, there_and_back

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, and steps over their blocks."""
    shrink(host.CONFIGS, "gfx942", {"BT": 16, "BB": 2}, monkeypatch)


def check() -> None:
    choice = torch.arange(40) % 6
    found = ordered(choice, "triton")
    assert torch.equal(found.order, torch.argsort(choice, stable=True))
    assert torch.equal(found.counts, torch.bincount(choice))

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return there_and_back("random", True, "identity", backend, x)

    inputs = inputs_of("random", torch.float32)
    exact = run_pass(run, "reference", {n: x.double() for n, x in inputs.items()})
    assert_close(run_pass(run, "triton", inputs), exact, 1e-6)


BUGS = {
    "permute_count": {
        "tokens past the last counted": (
            "o_t < num_tokens, other=CLASSES", "o_t < num_tokens, other=0",
        ),
    },
    "permute_sum": {
        "only the first block of a step": ("o_b = tl.arange(0, BB)", "o_b = 0 * tl.arange(0, BB)"),
        "classes begin where they end": (
            "tl.cumsum(a_total, axis=0) - a_total", "tl.cumsum(a_total, axis=0)",
        ),
        "a block on top of the one before": ("tl.cumsum(b, axis=0) - b", "0 * b"),
        "a step on top of the one before": ("a_start += tl.sum(b, axis=0)", "a_start += 0"),
        "the last class not counted": ("mask=o_c <= num_experts", "mask=o_c < num_experts"),
    },
    "permute_place": {
        "rank of the token before": (
            "tl.cumsum(b_members, axis=0) - 1", "tl.cumsum(b_members, axis=0)",
        ),
        "places not stable": (
            "tl.cumsum(b_members, axis=0) - 1",
            "tl.sum(b_members, axis=0)[None, :] - tl.cumsum(b_members, axis=0)",
        ),
    },
    "permute_gather": {
        "rows stored where tokens stand": (
            "tl.store(rows + place * D", "tl.store(rows + token * D",
        ),
    },
    "permute_scatter": {
        "rows read where tokens stand": (
            "tl.load(rows + place * D + o_c, mask=m)\n    elif",
            "tl.load(rows + token * D + o_c, mask=m)\n    elif",
        ),
        "rest read by place": (
            "b = tl.load(rest + token * D + o_c, mask=m)\n    else",
            "b = tl.load(rest + place * D + o_c, mask=m)\n    else",
        ),
        "skipped tokens without probability": (
            "if probability is not None:",
            "if (probability is not None) & (place < num_tokens - tl.load(skipped)):",
        ),
        "probability of another token": (
            "tl.load(probability + token).to(tl.float32)).to(b.dtype)",
            "tl.load(probability + place).to(tl.float32)).to(b.dtype)",
        ),
        "columns past the last": ("    m = o_c < D", "    m = o_c < COLUMNS"),
    },
    "permute_scatter_backward": {
        "gradient without probability": (
            "tl.store(grad_rows + place * D + o_c, b_scaled",
            "tl.store(grad_rows + place * D + o_c, b_grad",
        ),
        "gradient by token": ("tl.store(grad_rows + place * D", "tl.store(grad_rows + token * D"),
        "no gradient of the probability of skipped tokens": (
            "        if rest is not None:", "        if rest is None:",
        ),
        "no gradient of skipped tokens": (
            "        if grad_rest is not None:", "        if grad_rest is None:",
        ),
    },
}  # fmt: skip


@of_kernels(BUGS, nightly=True)
def test_a_bug_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(BUGS[kernel][bug], kernels, (host, [kernel]), tmp_path, monkeypatch)
    assert_caught(check)


def test_without_a_bug_nothing_is_caught() -> None:
    check()
