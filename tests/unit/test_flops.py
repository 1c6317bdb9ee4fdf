from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zaya_train.config.schema import ModelConfig
from zaya_train.hub.convert import meta_model
from zaya_train.model.flops import (
    attention_flops_per_token,
    matmul_flops_per_token,
    model_size,
    train_flops_per_token,
)

from ..helpers.models import REFERENCE, TINY, VARIANTS, blocks, random_model, random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

torch.set_num_threads(1)
ZAYA1_8B = ModelConfig(
    vocab_size=262_272,
    num_layers=40,
    hidden_size=2048,
    num_query_heads=8,
    num_kv_heads=2,
    head_dim=128,
    num_experts=16,
    expert_ffn_size=2048,
    router_size=256,
)


def random_configs() -> Iterator[ModelConfig]:
    draw = random.Random(0)
    for _ in range(12):
        kv_heads = draw.choice([1, 2, 3, 4])
        yield ModelConfig(
            vocab_size=draw.randint(2, 3000),
            num_layers=draw.randint(1, 6),
            hidden_size=draw.randint(1, 200),
            num_query_heads=kv_heads * draw.randint(1, 4),
            num_kv_heads=kv_heads,
            head_dim=4 * draw.randint(1, 20),
            num_experts=draw.randint(1, 20),
            expert_ffn_size=draw.randint(1, 100),
            router_size=draw.randint(1, 100),
            conv_depthwise_taps=draw.randint(1, 4),
            conv_grouped_taps=draw.randint(1, 4),
            skip_class=draw.random() < 0.5,
        )


def count(config: ModelConfig) -> int:
    return sum(p.numel() for p in meta_model(config).parameters())


def test_the_full_size_model_has_its_published_parameters() -> None:
    size = model_size(ZAYA1_8B)
    assert count(ZAYA1_8B) == size.total == 8_840_488_784
    assert size.embedding == 262_272 * 2048
    # 8.30 B without the embedding, 0.754 B active per token (2605.05365, table I).
    assert round((size.total - size.embedding) / 1e9, 2) == 8.30
    assert size.active / 1e9 == pytest.approx(0.754, abs=1e-3)


@pytest.mark.parametrize("config", [*random_configs(), *VARIANTS.values()], ids=lambda _: "")
def test_counts_are_exact(config: ModelConfig) -> None:
    size = model_size(config)
    model = meta_model(config)
    assert size.total == sum(p.numel() for p in model.parameters())
    assert size.embedding == model.embedding.numel()
    experts = sum(p.numel() for layer in blocks(model) for p in layer.moe.experts.parameters())
    assert size.experts == experts
    idle = experts - experts // config.num_experts
    assert size.active == size.total - size.embedding - idle


def counted_flops(config: ModelConfig, sequence: int) -> int:
    """Operations torch counts in one forward of the readable back ends, no token skipped."""
    model = random_model(config, kernels=REFERENCE)
    with torch.no_grad():
        for layer in blocks(model):
            layer.moe.router.balancing_bias[-1] = -100.0
    tokens = random_tokens(config, 1, sequence)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.logits(tokens)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", ["one_kv_head", "one_layer", "no_taps"])
def test_flops_are_what_torch_counts(name: str) -> None:
    """The readable attention computes all S x S scores, of which half are needed."""
    config, sequence = VARIANTS[name], 8
    counted = counted_flops(config, sequence)
    scores = 4 * config.num_layers * config.num_query_heads * config.head_dim * sequence**2
    assert counted - scores == sequence * matmul_flops_per_token(config)


def test_attention_sees_half_the_document_on_average() -> None:
    width = TINY.num_layers * TINY.num_query_heads * TINY.head_dim
    for length in (1, 2, 7, 1024):
        exact = sum(4 * width * (position + 1) for position in range(length)) / length
        assert attention_flops_per_token(TINY, length) == exact


def test_training_is_three_forwards() -> None:
    forward = matmul_flops_per_token(TINY) + attention_flops_per_token(TINY, 64)
    assert train_flops_per_token(TINY, 64) == 3 * forward
