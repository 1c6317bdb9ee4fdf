"""A whole model on Triton kernels, interpreted, beside the same model on eager torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from zaya_train.config.schema import KernelsConfig

from ..helpers.models import TINY, packed, random_model, with_kernels

if TYPE_CHECKING:
    from zaya_train.config.schema import (
        GroupedMLPName,
        ModelConfig,
        NativeKernelName,
        RecomputeKind,
    )
    from zaya_train.model import ZayaModel

pytest.importorskip("triton", reason="the extra `triton` is not installed")
from zaya_kernels.workshop.interpreter import counting

pytestmark = pytest.mark.usefixtures("interpreter")

ROW = 24


def spread(model: ZayaModel, seed: int) -> ZayaModel:
    """With routers that send tokens to several experts and to none, and nothing to one expert."""
    for layer in model.layers:
        router = layer.get_submodule("moe.router")
        last = router.get_parameter("out")
        noise = torch.randn(5, last.shape[1], generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            last.copy_(noise[: last.shape[0]])
            router.get_buffer("balancing_bias")[model.config.num_experts :] += 0.2
    return model


def assert_agrees_with_eager(config: ModelConfig, kernels: KernelsConfig, seed: int) -> None:
    """Loss and gradients, equal but for rounding."""
    eager = spread(random_model(config), seed)
    triton = with_kernels(eager, kernels)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.vocab_size, (1, ROW), generator=generator)
    labels = torch.randint(0, config.vocab_size, (1, ROW), generator=generator)
    layout = packed([[11, 1, 12]], ROW)
    gradients, loads = [], []
    for model in (eager, triton):
        output = model(tokens, labels, layout)
        output.loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append((output.loss, found))
        loads.append(output.load)
    assert torch.equal(*loads)
    first = loads[0][0]
    assert bool((first[: config.num_experts] == 0).any()), "every expert has tokens"
    assert not config.skip_class or first[-1] > 0, "no token is skipped"
    (loss, expected), (other, found) = gradients
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = float(expected[name].norm())
        assert float((gradient - expected[name]).norm()) <= 2e-4 * scale + 1e-6, name


def test_loss_and_gradients_agree_with_eager() -> None:
    config = replace(TINY, num_layers=2, num_kv_heads=1, head_dim=32, num_query_heads=2)
    kernels = KernelsConfig(
        cca="triton",
        norm_residual="triton",
        attention="triton",
        grouped_mlp="triton",
        grouped_mlp_recompute=True,
        router="triton",
        moe_permute="triton",
        linear_cross_entropy="triton",
    )
    assert_agrees_with_eager(config, kernels, 100)


@pytest.mark.parametrize(
    ("permute", "experts"),
    [
        ("triton", "triton"),
        ("triton", "eager"),
        ("eager", "triton"),
        ("eager", "grouped_mm"),
        ("triton", "grouped_mm"),
    ],
)
@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, num_layers=1, skip_output="identity"),
        replace(TINY, num_layers=1, skip_output="zero"),
        replace(TINY, num_layers=1, skip_class=False),
    ],
    ids=["identity", "zero", "no skip class"],
)
def test_permutation_and_experts_may_be_of_different_back_ends(
    config: ModelConfig, permute: NativeKernelName, experts: GroupedMLPName
) -> None:
    kernels = KernelsConfig(moe_permute=permute, grouped_mlp=experts)
    assert_agrees_with_eager(config, kernels, 101)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_pass_made_again_takes_the_saved_routing(recompute: RecomputeKind) -> None:
    """The balancing bias moves between forward and backward: a new choice would be another one."""
    config = replace(TINY, num_layers=2)
    kernels = KernelsConfig(router="triton")
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.vocab_size, (1, 12), generator=generator)
    found = []
    kinds: tuple[RecomputeKind, ...] = ("none", recompute)
    for kind in kinds:
        model = random_model(config, kernels=kernels, recompute=kind)
        output = model(tokens, tokens, packed([[12]], 12))
        for layer in model.layers:
            router = layer.get_submodule("moe.router")
            router.get_buffer("balancing_bias").add_(torch.arange(5.0))
        torch.autograd.backward(output.loss)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


def test_a_layer_passes_over_the_stream_three_times() -> None:
    """Attention's norm, its residual scaling with the experts' norm, the experts' residual
    scaling; and as often backward. The last norm is one more."""
    config = replace(TINY, num_layers=2)
    model = random_model(config, kernels=KernelsConfig(norm_residual="triton"))
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    with counting() as counts:
        torch.autograd.backward(model(tokens, tokens, packed([[12]], 12)).loss)
    kernels = [count.kernel for count in counts]
    for name in ("norm_residual_forward", "norm_residual_backward"):
        assert kernels.count(name) == 3 * config.num_layers + 1
