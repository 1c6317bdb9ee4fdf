"""Each bug planted in a Triton kernel of the loss is caught by what the suite compares, or by the
checks of the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.launch import COMPUTE_UNITS, INTERPRETED
from zaya_kernels.linear_cross_entropy import triton as host
from zaya_kernels.linear_cross_entropy import triton_kernels as kernels

from ..helpers.kernels import assert_close, run_pass
from ..helpers.mutation import assert_caught, of_kernels, plant, shrink
from .test_linear_cross_entropy import labels_of
from .test_triton_linear_cross_entropy import call, inputs_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

TOKENS, VOCAB, COLUMNS = 37, 41, 16

BUGS = {
    "loss_scores": {
        "a class too many": ("(i_n * BN + o_n < vocab)", "(i_n * BN + o_n <= vocab)"),
        "label of the next class": ("o_n[None, :] == b_label", "o_n[None, :] - 1 == b_label"),
        "weight rows a padded stride apart": (
            "o_k[:, None] + (o_v * D)", "o_k[:, None] + (o_v * BK)",
        ),
    },
    "loss_gradient": {
        "sums of other maxima": ("* LOG2E) * b_sum", "* 0.0) * b_sum"),
        "maximum of another block": ("((first + o_b) * rows + row)", "(o_b * rows + row)"),
        "z-loss without its gradient": ("1.0 + 2.0 * z_loss * lse", "1.0"),
        "gradient in rows that only fill": ("* lse, 0.0)\n        o_b", "* lse, 1.0)\n        o_b"),
    },
    "loss_grad_hidden": {
        "one class short of a sum": ("(first + each, vocab)", "(first + each, vocab - 1)"),
        "sums overlap": ("(first + each, vocab)", "(first + each + BK, vocab)"),
        "classes past whole steps left out": ("if first + whole < last:", "if whole < 0:"),
    },
    "loss_grad_weight": {
        "a chunk forgets the others": (
            "if FIRST:\n        a_w", "if FIRST or NARROW:\n        a_w",
        ),
        "scores' rows V apart": ("(o_k * width)[None, :]", "(o_k * vocab)[None, :]"),
        "low bits shifted": ("(low.to(tl.uint32) << 8)", "(low.to(tl.uint32) << 12)"),
    },
    "loss_finish": {
        "factor of the loss left out": ("(x * tl.load(factor))", "(x + 0.0 * tl.load(factor))"),
        "low bits shifted": ("(low.to(tl.uint32) << 8)", "(low.to(tl.uint32) << 12)"),
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of one block of 16 rows, two or three blocks of classes, two sums."""
    monkeypatch.setitem(COMPUTE_UNITS, INTERPRETED, 2)
    monkeypatch.setattr(host, "SCORE_BYTES", 1)
    sizes = {"BM": 16, "BN": 16, "BK": 8, "BT": 2, "BLOCK": 512}
    shrink(host.CONFIGS, INTERPRETED, sizes, monkeypatch)
    table = host.CONFIGS["loss_grad_weight"]
    own = table[INTERPRETED]
    wide = {**table, INTERPRETED: replace(own, blocks={**own.blocks, "BM": 32})}
    monkeypatch.setitem(host.CONFIGS, "loss_grad_weight", wide)


def check() -> None:
    inputs = inputs_of(TOKENS, VOCAB, torch.bfloat16, COLUMNS)
    labels = labels_of(TOKENS, TOKENS - 1, VOCAB)
    exact = run_pass(
        lambda backend, x: call(labels, backend, x, 0.1),
        "reference",
        {name: x.double() for name, x in inputs.items()},
    )
    found = run_pass(lambda backend, x: call(labels, backend, x, 0.1), "triton", inputs)
    assert_close(found, exact, 4e-3)


@of_kernels(BUGS, nightly=True)
def test_a_bug_in_the_loss_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(BUGS[kernel][bug], kernels, (host, [kernel]), tmp_path, monkeypatch)
    assert_caught(check)


def test_without_a_bug_nothing_is_caught() -> None:
    check()
