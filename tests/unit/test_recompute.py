"""Recomputation changes memory and nothing else, and never routes again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels import products

from tests.helpers.models import (
    NATIVE,
    REFERENCE,
    TINY,
    blocks,
    next_tokens,
    packed,
    random_model,
    random_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_train.config.schema import KernelsConfig, RecomputeKind
    from zaya_train.model import ModelOutput, ZayaModel

CONFIG = replace(TINY, skip_output="identity", conv_depthwise_taps=3)
KINDS: tuple[RecomputeKind, ...] = ("selective", "full")


def forward(model: ZayaModel) -> ModelOutput:
    tokens = random_tokens(CONFIG, 2, 24)
    out: ModelOutput = model(tokens, next_tokens(tokens), packed([[9, 1, 14], [20]], 24))
    return out


def backward(model: ZayaModel, out: ModelOutput) -> dict[str, Tensor]:
    torch.autograd.backward(out.loss)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [n for n in got if not torch.equal(got[n], expected[n])] == []


@pytest.mark.parametrize("smallest", [1, products.SMALLEST_PRODUCT], ids=["onednn", "torch"])
@pytest.mark.parametrize("kernels", [None, REFERENCE, NATIVE], ids=["eager", "reference", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_bitwise_those_of_keeping_everything(
    kind: RecomputeKind,
    kernels: KernelsConfig | None,
    smallest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", smallest)
    models = [random_model(CONFIG, kernels=kernels, recompute=k) for k in ("none", kind)]
    outs = [forward(model) for model in models]
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert torch.equal(outs[0].load, outs[1].load)
    expected, got = (backward(m, out) for m, out in zip(models, outs, strict=True))
    assert_same(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_moves_before_the_backward_pass_moves_no_token(kind: RecomputeKind) -> None:
    expected = backward(kept := random_model(CONFIG), forward(kept))
    model = random_model(CONFIG, recompute=kind)
    out = forward(model)
    with torch.no_grad():
        for layer in blocks(model):
            layer.moe.router.balancing_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0]))
    elsewhere = forward(model).load
    assert torch.equal(elsewhere[:, 2], out.load.sum(dim=1)) and (out.load[:, 2] < 5).all()
    assert_same(backward(model, out), expected)


def saved_bytes(kind: RecomputeKind) -> int:
    """Distinct storages that a forward pass keeps for the backward pass, parameters excluded."""
    model = random_model(replace(CONFIG, hidden_size=64, expert_ffn_size=64), recompute=kind)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = random_tokens(CONFIG, 2, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(tokens, next_tokens(tokens), packed([[64], [64]], 64))
    assert out.loss.isfinite()
    # The inputs of a checkpointed region do not pass the hooks: of a whole layer stream and router
    # state; of selective regions the stream and attention's output.
    inputs = {"none": 0, "selective": 2 * 64, "full": 64 + CONFIG.router_size}[kind]
    return sum(seen.values()) + tokens.numel() * inputs * 4 * CONFIG.num_layers


def test_each_kind_keeps_less_than_the_one_before() -> None:
    none, selective, full = (saved_bytes(kind) for kind in ("none", "selective", "full"))
    assert full < 0.5 * none
    assert selective < 0.8 * none


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_keeps_nothing(kind: RecomputeKind) -> None:
    model = random_model(CONFIG, recompute=kind)
    with torch.no_grad():
        assert not forward(model).loss.requires_grad
