from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zaya_kernels.attention.op import attention

from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.config.schema import KernelsConfig, ModelConfig
from zaya_train.hub.convert import meta_model
from zaya_train.model.flops import (
    Work,
    attention_flops_per_token,
    document_pairs,
    forward_flops,
    matmul_flops_per_token,
    model_size,
    train_flops,
    train_flops_per_token,
)

from ..helpers.models import (
    TINY,
    VARIANTS,
    ZAYA1_8B,
    blocks,
    packed,
    random_model,
    random_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

torch.set_num_threads(1)


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


COUNTED = KernelsConfig(
    cca="reference",
    attention="reference",
    norm_residual="reference",
    router="reference",
    grouped_mlp="reference",
    # The reference's head takes all tokens; this one the supervised, as training does.
    linear_cross_entropy="eager",
)
DOCUMENTS = [[5, 1, 9, 3], [18]]
"""Of two packed rows, filled whole."""


def counted(run: Callable[[], object]) -> int:
    """Operations of products and convolutions, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def whole_scores(config: ModelConfig, backward: bool) -> int:
    """What one layer's readable attention computes: all pairs of each document."""
    shape = (len(DOCUMENTS), sum(DOCUMENTS[0]))
    q, k, v = (
        torch.zeros(*shape, heads, config.head_dim, requires_grad=True)
        for heads in (config.num_query_heads, config.num_kv_heads, config.num_kv_heads)
    )
    plan = packed(DOCUMENTS, shape[1]).attention

    def run() -> None:
        out = attention(q, k, v, plan, "reference")
        if backward:
            torch.autograd.backward(out.sum())

    return counted(run)


def visible_pairs() -> int:
    """By looking at every pair of tokens of every row."""
    pairs = 0
    for lengths in DOCUMENTS:
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        same = document[:, None] == document[None, :]
        pairs += int(same.tril().sum())
    return pairs


def depthwise(config: ModelConfig) -> int:
    """Of one token and layer: the readable form multiplies element by element, which torch does
    not count, so the library's own convolution over ten tokens stands for it."""
    channels = (config.num_query_heads + config.num_kv_heads) * config.head_dim
    taps = config.conv_depthwise_taps
    x, weight = torch.zeros(1, channels, 10 + taps - 1), torch.zeros(channels, 1, taps)
    return counted(lambda: torch.nn.functional.conv1d(x, weight, groups=channels)) // 10


@dataclass(frozen=True)
class Counted:
    """One real step: what the counter says, and what the step had to do."""

    flops: int
    work: Work


def count_step(config: ModelConfig, backward: bool) -> Counted:
    """A step over packed rows in which some tokens skip and some are not supervised."""
    model = random_model(config, kernels=COUNTED).double()
    with torch.no_grad():
        for layer in blocks(model):
            layer.moe.router.balancing_bias.zero_()
    shape = (len(DOCUMENTS), sum(DOCUMENTS[0]))
    tokens = random_tokens(config, *shape)
    labels = tokens.clone()
    labels[:, ::3] = IGNORE_LABEL
    layout = packed(DOCUMENTS, shape[1])
    loads: list[Tensor] = []

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = model(tokens, labels, layout)
        loads.append(out.load)
        if backward:
            torch.autograd.backward(out.loss)

    flops = counted(run)
    times = 3 if backward else 1
    pairs = 4 * config.num_query_heads * config.head_dim * visible_pairs()
    flops += config.num_layers * (times * pairs - whole_scores(config, backward))
    flops += config.num_layers * times * depthwise(config) * tokens.numel()
    work = Work(
        tokens=int(loads[0][0].sum()),
        expert_tokens=int(loads[0][:, : config.num_experts].sum()),
        pairs=document_pairs(n for row in DOCUMENTS for n in row),
        supervised=int((labels != IGNORE_LABEL).sum()),
    )
    return Counted(flops, work)


SIX = ["one_kv_head", "three_kv_heads", "four_kv_heads", "one_layer", "odd_widths", "one_expert"]


@pytest.mark.parametrize("name", SIX)
def test_a_forward_pass_over_packed_rows_is_what_the_counter_says(name: str) -> None:
    config = VARIANTS[name]
    step = count_step(config, backward=False)
    assert 0 < step.work.expert_tokens < config.num_layers * step.work.tokens, "some must skip"
    assert step.flops == forward_flops(config, step.work).total


@pytest.mark.parametrize("name", SIX)
def test_forward_and_backward_are_what_the_counter_says(name: str) -> None:
    step = count_step(VARIANTS[name], backward=True)
    assert step.flops == train_flops(VARIANTS[name], step.work)


def test_per_token_figures_are_those_of_a_step_in_which_nothing_is_left_out() -> None:
    n = 12
    work = Work(
        tokens=n, expert_tokens=n * TINY.num_layers, pairs=document_pairs([n]), supervised=n
    )
    flops = forward_flops(TINY, work)
    assert n * matmul_flops_per_token(TINY) == flops.total - flops.attention
    assert n * attention_flops_per_token(TINY, n) == flops.attention
    assert train_flops(TINY, work) == 3 * flops.total == n * train_flops_per_token(TINY, n)


def test_attention_sees_half_the_document_on_average() -> None:
    width = TINY.num_layers * TINY.num_query_heads * TINY.head_dim
    for length in (1, 2, 7, 1024):
        exact = sum(4 * width * (position + 1) for position in range(length)) / length
        assert attention_flops_per_token(TINY, length) == exact


def test_training_is_three_forwards() -> None:
    forward = matmul_flops_per_token(TINY) + attention_flops_per_token(TINY, 64)
    assert train_flops_per_token(TINY, 64) == 3 * forward
