"""Parameters and floating-point operations of a model, from its configuration alone.

Legend: D hidden, H query heads, K KV heads, d head dim, E experts, F expert width, R router width,
V vocabulary, C router classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zaya_train.config.schema import ModelConfig


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts."""

    total: int
    embedding: int
    active: int
    """Without the embedding, with one expert per layer: what a token passes through."""
    experts: int
    """Of all routed experts together."""


def model_size(config: ModelConfig) -> ModelSize:
    """Exact counts; they equal the sum over a constructed model's parameters."""
    d, hidden = config.head_dim, config.hidden_size
    heads = config.num_query_heads + config.num_kv_heads
    channels = heads * d
    attention = hidden * (channels + config.num_kv_heads * d)
    attention += hidden * config.num_query_heads * d
    attention += channels * (config.conv_depthwise_taps + 1)
    attention += channels * (d * config.conv_grouped_taps + 1) + config.num_kv_heads
    router = _router_size(config)
    expert = 3 * hidden * config.expert_ffn_size
    vectors = 2 * hidden + 8 * hidden
    per_layer = attention + router + vectors
    embedding = config.vocab_size * hidden
    # Layer 0's router has no depth-averaging scale.
    shared = config.num_layers * per_layer - config.router_size + 3 * hidden
    experts = config.num_layers * config.num_experts * expert
    return ModelSize(
        total=embedding + shared + experts,
        embedding=embedding,
        active=shared + config.num_layers * expert,
        experts=experts,
    )


def _router_size(config: ModelConfig) -> int:
    size = config.router_size
    classes = config.num_experts + int(config.skip_class)
    down = size * config.hidden_size + size
    return down + 2 * (size * size + size) + classes * size + 2 * size


def matmul_flops_per_token(config: ModelConfig) -> int:
    """Forward operations of the weight products one token passes through, LM head included:
    two per weight. Elementwise work and attention scores are not in it."""
    d, hidden, size = config.head_dim, config.hidden_size, config.router_size
    heads = config.num_query_heads + config.num_kv_heads
    attention = hidden * (heads + config.num_kv_heads) * d + hidden * config.num_query_heads * d
    convolution = heads * d * d * config.conv_grouped_taps
    classes = config.num_experts + int(config.skip_class)
    router = size * hidden + 2 * size * size + classes * size
    expert = 3 * hidden * config.expert_ffn_size
    per_layer = attention + convolution + router + expert
    return 2 * (config.num_layers * per_layer + config.vocab_size * hidden)


def attention_flops_per_token(config: ModelConfig, document_tokens: float) -> float:
    """Forward operations of scores and weighted values for a token of a document of the given
    length, averaged over its positions: half the keys are visible."""
    visible = (document_tokens + 1) / 2
    return 4 * config.num_layers * config.num_query_heads * config.head_dim * visible


def train_flops_per_token(config: ModelConfig, document_tokens: float) -> float:
    """Forward and backward: three times forward."""
    forward = matmul_flops_per_token(config) + attention_flops_per_token(config, document_tokens)
    return 3 * forward
