"""Parameters and floating-point operations of a model, from its configuration alone.

Legend: D hidden, H query heads, K KV heads, d head dim, E experts, F expert width, R router width,
V vocabulary, C router classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

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


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a forward pass over packed rows has to do; padding is no work."""

    tokens: int
    """In documents."""
    expert_tokens: int
    """Tokens that went to an expert, summed over the layers; those that skip do not."""
    pairs: int
    """Pairs of a query and a key that it may see, of one layer (`document_pairs`)."""
    supervised: int
    """Tokens with a label: the LM head's."""


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Forward operations by part, a multiplication and an addition each. Elementwise work (norms,
    rotation, softmax, activations) is not in it."""

    projections: int
    """Into and out of CCA's compressed space."""
    depthwise_convolution: int
    grouped_convolution: int
    attention: int
    """Scores and weighted values of the pairs there are."""
    router: int
    experts: int
    head: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def forward_flops(config: ModelConfig, work: Work) -> ForwardFlops:
    """Exact counts of one forward pass; forward and backward are three times as many."""
    d, hidden, size = config.head_dim, config.hidden_size, config.router_size
    channels = (config.num_query_heads + config.num_kv_heads) * d
    values = config.num_kv_heads * d
    classes = config.num_experts + int(config.skip_class)
    layers = 2 * config.num_layers * work.tokens
    return ForwardFlops(
        projections=layers * hidden * (channels + values + config.num_query_heads * d),
        depthwise_convolution=layers * channels * config.conv_depthwise_taps,
        grouped_convolution=layers * channels * d * config.conv_grouped_taps,
        attention=4 * config.num_layers * config.num_query_heads * d * work.pairs,
        router=layers * (size * hidden + 2 * size * size + classes * size),
        experts=2 * work.expert_tokens * 3 * hidden * config.expert_ffn_size,
        head=2 * work.supervised * config.vocab_size * hidden,
    )


def document_pairs(lengths: Iterable[int]) -> int:
    """Pairs of a query and a key before it or itself, in documents of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def train_flops(config: ModelConfig, work: Work) -> int:
    """Forward and backward of `work`: every product of the forward pass has two in the backward.
    What kernels or `parallel.recompute` make again is not counted."""
    return 3 * forward_flops(config, work).total


def matmul_flops_per_token(config: ModelConfig) -> int:
    """Forward operations of the weight products one token passes through, convolutions and LM head
    included, no expert skipped: two per weight. Attention scores are not in it."""
    token = Work(tokens=1, expert_tokens=config.num_layers, pairs=0, supervised=1)
    return forward_flops(config, token).total


def attention_flops_per_token(config: ModelConfig, document_tokens: float) -> float:
    """Forward operations of scores and weighted values for a token of a document of the given
    length, averaged over its positions: half the keys are visible."""
    visible = (document_tokens + 1) / 2
    return 4 * config.num_layers * config.num_query_heads * config.head_dim * visible


def train_flops_per_token(config: ModelConfig, document_tokens: float) -> float:
    """Forward and backward of a supervised token that skips no expert: three times forward."""
    forward = matmul_flops_per_token(config) + attention_flops_per_token(config, document_tokens)
    return 3 * forward
