"""Each bug planted in a Triton kernel of the router is caught by what the suite compares, or by the
checks of the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.launch import INTERPRETED
from zaya_kernels.router import triton as host
from zaya_kernels.router import triton_kernels as kernels

from ..helpers.kernels import Passed, assert_close, run_pass
from ..helpers.mutation import assert_caught, of_kernels, plant, shrink
from .test_router import call, context_of, inputs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("interpreter")

SHAPE = (1, 19)

BUGS = {
    "router_grad_choice": {
        "a token too many": ("m = tl.arange(0, BM) < left\n", "m = tl.arange(0, BM) <= left\n"),
        "softmax's pull left out": (
            "(tl.where(chosen, 1.0, 0.0) - p)", "tl.where(chosen, 1.0, 0.0)",
        ),
    },
    "router_product": {
        "weight read turned": ("o_k[:, None] * STEP_K", "o_k[:, None] * STEP_N"),
        "norm's weight of the first columns": ("norm + first + o_k", "norm + o_k"),
        "slope without the density": ("+ x * DENSITY", "+ 0.0 * x * DENSITY"),
    },
    "router_choice": {
        "another activation": ("x * (1.0 + tl.erf(x * HALF_ROOT))", "x * (1.0 + tl.erf(x * 0.7))"),
        "a class too many": ("(o_c < C)[None, :], s,", "(o_c <= C)[None, :], s,"),
        "biased probability": (
            "(chosen, p, 0.0), axis=1), m", "(chosen, 1.1 * p, 0.0), axis=1), m",
        ),
        "choice without the bias": ("p + b_bias[None, :], axis=1)", "p, axis=1)"),
        "padding is load": ("counted = m & (tl.load(valid + row + o_m) != 0)", "counted = m"),
        "last token counted again": ("counted = m & (tl", "counted = (tl"),
    },
    "router_grad_state": {
        "norm's pull left out": ("acc - b_n * (tl.sum", "acc - 0.0 * b_n * (tl.sum"),
        "later layers left out": ("acc += tl.load(grad_later", "acc += 0.0 * tl.load(grad_later"),
        "last token in the sums again": ("tl.where(m, acc, 0.0), axis=0", "acc, axis=0"),
    },
    "router_grad_weight": {
        "stretches overlap": ("(first + each, tokens)", "(first + each + BT, tokens)"),
        "tail of a stretch again": ("mask=m, other=0.0)\n        b_a", "other=None)\n        b_a"),
        "bias of one block": ("a_bias += tl.sum", "a_bias = tl.sum"),
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two stretches of several blocks of tokens.
    monkeypatch.setattr(host, "SPLIT_WAVES", 1)
    shrink(host.CONFIGS, INTERPRETED, {"BM": 16, "BN": 16, "BK": 8, "BT": 8}, monkeypatch)


def check() -> None:
    inputs = inputs_of(SHAPE, torch.float32, False, 16, 32)
    inputs["out"] = 4 * inputs["out"] - 4 * inputs["out"].mean(dim=1, keepdim=True)

    context = context_of(SHAPE)
    context = replace(context, balancing=5 * context.balancing)

    def passed(backend: str, dtype: torch.dtype) -> Passed:
        loads: list[Tensor] = []

        def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
            routed = call(backend, x, context)
            loads.extend([routed.choice, routed.load])
            return [routed.probability, routed.state]

        done = run_pass(run, backend, {name: x.to(dtype) for name, x in inputs.items()})
        return Passed([*done.outputs, *loads], done.gradients)

    assert_close(passed("triton", torch.float32), passed("reference", torch.float64), 4e-6)


@of_kernels(BUGS, nightly=True)
def test_a_bug_in_the_router_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(BUGS[kernel][bug], kernels, (host, [kernel]), tmp_path, monkeypatch)
    assert_caught(check)


def test_without_a_bug_nothing_is_caught() -> None:
    check()
