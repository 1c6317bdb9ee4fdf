"""The model's own rules: causality, loss, routing, back ends, precision."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pytest
import torch

from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.config.schema import KernelsConfig
from zaya_train.model import SequenceLayout, ZayaModel
from zaya_train.model.interfaces import LocalDispatcher, Surroundings, WholeRows
from zaya_train.model.recompute import RoutingTape
from zaya_train.model.rope import rotary_tables

from ..helpers.models import (
    CPU,
    REFERENCE,
    TINY,
    VARIANTS,
    blocks,
    next_tokens,
    packed,
    random_model,
    random_tokens,
    with_kernels,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

torch.set_num_threads(1)


def gradients_of(model: ZayaModel, tokens: Tensor) -> dict[str, Tensor]:
    layout = packed([[tokens.shape[1]]] * tokens.shape[0], tokens.shape[1])
    torch.autograd.backward(model(tokens, next_tokens(tokens), layout).loss)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("skip_output", ["zero", "identity"])
@pytest.mark.parametrize("name", ["one_kv_head", "four_kv_heads", "odd_widths"])
def test_back_ends_agree_through_the_whole_model(
    name: str, skip_output: Literal["zero", "identity"]
) -> None:
    """fp64: loss, load and the gradient of every parameter."""
    model = random_model(replace(VARIANTS[name], skip_output=skip_output)).double()
    with torch.no_grad():
        for layer in blocks(model)[1:]:
            layer.moe.router.balancing_bias[-1] += 1.05
    other = with_kernels(model, REFERENCE)
    tokens = random_tokens(model.config, 2, 11)
    layout, labels = packed([[5, 6], [1, 8]], 11), next_tokens(tokens)
    found, expected = model(tokens, labels, layout), other(tokens, labels, layout)
    assert torch.equal(found.load, expected.load)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    torch.autograd.backward(found.loss)
    torch.autograd.backward(expected.loss)
    for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, key
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = random_model(VARIANTS[name])
    gradients = gradients_of(model, random_tokens(model.config, 4, 32))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    # One expert and its skip class: the router still decides the weight.
    assert [key for key, grad in gradients.items() if not grad.any()] == []


def test_later_tokens_change_nothing_before_them() -> None:
    model = random_model(VARIANTS["four_kv_heads"])
    tokens = random_tokens(model.config, 1, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()


@pytest.mark.parametrize("taps", [(1, 1), (2, 2), (3, 4)])
def test_convolutions_reach_as_far_as_their_taps(taps: tuple[int, int]) -> None:
    """Attention off (zero output projection would hide it, so the projection is watched): a token
    moves the queries of itself and of the taps - 2 tokens behind it, and no others."""
    config = replace(TINY, conv_depthwise_taps=taps[0], conv_grouped_taps=taps[1], num_layers=1)
    model = random_model(config)
    tokens = random_tokens(config, 1, 14)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % config.vocab_size
    queries = [queries_of(model, t) for t in (tokens, changed)]
    moved = (queries[0] != queries[1]).flatten(2).any(dim=-1)[0]
    assert moved.nonzero().squeeze(1).tolist() == list(range(4, 4 + sum(taps) - 1))


def queries_of(model: ZayaModel, tokens: Tensor) -> Tensor:
    """Queries [B, S, H, d] that layer 0 hands to attention."""
    seen: list[Tensor] = []

    class Watching(WholeRows):
        def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(keys)
            return keys, values

    watched = ZayaModel(model.config, Surroundings(exchange=Watching()))
    watched.load_state_dict(model.state_dict())
    with torch.no_grad():
        watched.logits(tokens)
    return seen[0]


def test_loss_is_the_sum_over_supervised_tokens() -> None:
    model = random_model(TINY)
    tokens = random_tokens(TINY, 2, 9)
    labels = next_tokens(tokens)
    labels[0, 3:6] = IGNORE_LABEL
    layout = packed([[9], [9]], 9)
    with torch.no_grad():
        found = model(tokens, labels, layout).loss
        logits = model.logits(tokens).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found.dtype == torch.float32 and found.ndim == 0


def test_balancing_bias_moves_the_choice_and_not_the_weight() -> None:
    model = random_model(TINY)
    tokens = random_tokens(TINY, 2, 9)
    router = blocks(model)[0].moe.router
    x, valid = torch.randn(2, 9, TINY.hidden_size), torch.ones(2, 9, dtype=torch.bool)
    free = router(x, None, valid)
    with torch.no_grad():
        router.balancing_bias[2] += 5.0
    forced = router(x, None, valid)
    assert (forced.choice == 2).all() and forced.load.tolist() == [0, 0, 18, 0, 0]
    same = free.choice == 2
    torch.testing.assert_close(forced.probability[same], free.probability[same])
    assert float(forced.probability.max()) <= 1.0
    gradients = gradients_of(model, tokens)
    assert not any("balancing" in name for name in gradients)
    assert all(buffer.grad is None for buffer in model.buffers())


def test_depth_averaging_adds_the_state_before_the_norm() -> None:
    model = random_model(TINY)
    first, second = (layer.moe.router for layer in blocks(model)[:2])
    assert first.depth_scale is None and second.depth_scale is not None
    x, valid = torch.randn(1, 4, TINY.hidden_size), torch.ones(1, 4, dtype=torch.bool)
    previous = torch.randn(1, 4, TINY.router_size)
    plain, averaged = second(x, None, valid), second(x, previous, valid)
    torch.testing.assert_close(averaged.state, plain.state + previous * second.depth_scale)


def test_routing_is_computed_in_fp32_under_bf16_weights() -> None:
    model = random_model(TINY).to(torch.bfloat16)
    router = blocks(model)[1].moe.router
    x = torch.randn(1, 4, TINY.hidden_size).bfloat16()
    previous = torch.randn(1, 4, TINY.router_size)
    routing = router(x, previous, torch.ones(1, 4, dtype=torch.bool))
    assert routing.state.dtype == routing.probability.dtype == torch.float32


def test_the_stream_is_fp32_under_bf16_weights() -> None:
    model = random_model(TINY).to(torch.bfloat16)
    streams: list[torch.dtype] = []
    for layer in blocks(model):
        layer.register_forward_hook(lambda module, given, result: streams.append(result[0].dtype))
    tokens = random_tokens(TINY, 1, 6)
    logits = model.logits(tokens)
    assert streams == [torch.float32] * TINY.num_layers and logits.dtype == torch.float32
    assert model(tokens, tokens, packed([[6]], 6)).loss.dtype == torch.float32


def test_one_class_less_without_the_skip_class() -> None:
    config = replace(TINY, skip_class=False)
    model = random_model(config)
    tokens = random_tokens(config, 2, 9)
    load = model(tokens, tokens, packed([[9], [9]], 9)).load
    assert load.shape == (config.num_layers, config.num_experts)
    assert load.sum(dim=1).tolist() == [18.0] * config.num_layers


CHOICES = {
    "mixed": [2, 0, 4, 1, 0, 4, 3],
    "all_skipped": [4, 4, 4],
    "one_expert": [1, 1, 1],
    "none": [],
}


@pytest.mark.parametrize("name", CHOICES)
def test_dispatch_and_combine(name: str) -> None:
    choice = torch.tensor(CHOICES[name], dtype=torch.int64)
    tokens = torch.randn(len(choice), 5, dtype=torch.float64, requires_grad=True)
    dispatcher = LocalDispatcher()
    route = dispatcher.route(choice, 4, KernelsConfig())
    going = dispatcher.start_dispatch(tokens, route)
    rows = dispatcher.finish_dispatch(going)
    assert going.tokens is tokens
    expected = [token for e in range(4) for token in tokens[choice == e]]
    assert route.counts.tolist() == [int((choice == e).sum()) for e in range(4)]
    assert torch.equal(rows, torch.stack(expected) if expected else tokens[:0])
    sent = (choice < 4).unsqueeze(-1)
    pending = dispatcher.start_combine(rows * 3, route)
    probability = 0.5 ** torch.arange(len(choice), dtype=torch.float64)
    out = dispatcher.finish_combine(pending, tokens * 7, probability)
    factor = torch.where(sent, 3.0, 7.0) * probability.unsqueeze(-1).expand_as(tokens)
    assert torch.equal(out, tokens * factor)
    torch.autograd.backward(out.sum())
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, factor)


@pytest.mark.parametrize("skip_output", ["identity", "zero"])
def test_a_skipped_token_puts_out_itself_or_nothing(
    skip_output: Literal["identity", "zero"],
) -> None:
    config = replace(TINY, skip_output=skip_output)
    model = random_model(config)
    moe = blocks(model)[0].moe
    x, valid = torch.randn(2, 6, config.hidden_size), torch.ones(2, 6, dtype=torch.bool)
    norm = blocks(model)[0].moe_norm
    skip = torch.full((2, 6), config.num_experts)
    tape = RoutingTape(skip, torch.zeros(config.num_experts + 1))
    out, _, routing = moe(lambda: norm.beside(x), None, valid, tape)
    expected = norm(x) * routing.probability.unsqueeze(-1) if skip_output == "identity" else 0 * x
    torch.testing.assert_close(out, expected)


def test_unknown_back_ends_are_named() -> None:
    model = random_model(TINY, kernels=replace(KernelsConfig(), grouped_mlp="fast"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kernels\.grouped_mlp: no back end 'fast'"):
        model.logits(random_tokens(TINY, 1, 4))


@pytest.mark.parametrize("base", [10_000.0, 5_000_000.0])
def test_rotation_by_its_definition(base: float) -> None:
    positions = torch.tensor([[0, 1, 131_071]])
    cos, sin = rotary_tables(positions, base, 8)
    for j in range(4):
        angle = positions.double() * base ** (-2 * j / 8)
        # Angles are fp32: at position 131,071 half a unit in the last place is 0.004.
        torch.testing.assert_close(cos[..., j].double(), angle.cos(), rtol=0, atol=2e-2)
        torch.testing.assert_close(sin[..., j].double(), angle.sin(), rtol=0, atol=2e-2)


def test_attention_depends_on_distance_alone() -> None:
    """Rotation at work: a document's logits do not depend on where in the row it starts."""
    model = random_model(TINY)
    document = random_tokens(TINY, 1, 6)
    rows: Sequence[int] = (0, 3, 9)
    results = []
    for before in rows:
        tokens = torch.cat([random_tokens(TINY, 1, before, seed=5), document], dim=1)
        lengths = [[before, 6]] if before else [[6]]
        layout = SequenceLayout.of_documents(lengths, before + 6, CPU)
        with torch.no_grad():
            results.append(model.logits(tokens, layout)[:, before:])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)
