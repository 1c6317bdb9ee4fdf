"""In training, weight gradients of the experts' Triton kernels, interpreted, are added in fp32 to
the sums that FSDP2 keeps between micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from zaya_train.parallel.fsdp import GradientSums
from zaya_train.train import step

from ..dist.harness import Case, Setup, whole
from ..helpers.distributed import run_ranks

if TYPE_CHECKING:
    from torch import Tensor, nn
    from zaya_kernels.grouped_mlp.types import MainGradients

pytest.importorskip("triton", reason="the extra `triton` is not installed")

CHANGES = {"kernels.grouped_mlp": "triton", "model.num_layers": 1}


def gradients(case: Case) -> tuple[dict[str, Tensor], list[bool]]:
    """Of two micro-batches, whole; and for each pass of a layer whether it had sums."""
    found = []
    inner = GradientSums.of

    def of(self: GradientSums, experts: nn.Module) -> MainGradients | None:
        sums = inner(self, experts)
        found.append(sums is not None)
        return sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientSums, "of", of)
        setup = Setup.of(case, **CHANGES)
        few = setup.batches(0)[:2]
        count = torch.tensor(100)
        step._accumulate(setup.model, few, count, 0.0, setup.reduction, lambda _: None)
    parameters = setup.model.named_parameters()
    return {n: whole(p.grad) for n, p in parameters if p.grad is not None}, found


def with_and_without(case: Case) -> tuple[list[bool], dict[str, float]]:
    """Passes that had sums; each gradient's relative distance from the one of which
    autograd rounds every micro-batch's share to bf16 first."""
    from zaya_kernels.workshop.interpreter import install

    install()
    mine, used = gradients(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientSums, "attach", lambda *_: None)
        usual, unused = gradients(case)
    assert not any(unused) and mine.keys() == usual.keys()
    return used, {n: float((mine[n] - g).norm() / g.norm()) for n, g in usual.items()}


@pytest.mark.parametrize(
    "case",
    [
        Case(shard=2, recompute="full", compute="bf16"),
        Case(shard=2, expert=2, compute="bf16"),
    ],
    ids=lambda case: case.name,
)
def test_they_are_added_once_and_not_rounded(case: Case) -> None:
    for used, errors in run_ranks(with_and_without, 2, case):
        # With recompute each layer is passed twice.
        passes = len(used) // 2
        assert passes and used == [False] * passes + [True] * passes
        for name, error in errors.items():
            rounded = name.endswith(("experts.gate_up", "experts.down"))
            assert (0 < error < 2**-8) if rounded else error == 0, name


@pytest.mark.parametrize(
    "case",
    [
        Case(accumulation="reduce_each", compute="bf16"),
        # Gradients are of the reduction's type, so FSDP2 sums them where autograd does.
        Case(compute="fp32"),
    ],
    ids=lambda case: f"{case.accumulation}-{case.compute}",
)
def test_without_sums_autograd_gets_them(case: Case) -> None:
    for used in run_ranks(uses, 1, replace(case, micro_rows=2)):
        assert used == [False, False]


def uses(case: Case) -> list[bool]:
    from zaya_kernels.workshop.interpreter import install

    install()
    found, used = gradients(case)
    assert all(bool(g.isfinite().all()) for g in found.values())
    return used
