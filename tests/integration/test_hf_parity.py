"""transformers' ZayaForCausalLM as the oracle: logits and gradients, fp32, random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from zaya_kernels import products

from zaya_train.hub import from_hf, to_hf
from zaya_train.hub.names import tensor_names

from ..helpers.models import (
    NATIVE,
    REFERENCE,
    TINY,
    VARIANTS,
    blocks,
    next_tokens,
    packed,
    random_model,
    random_tokens,
    random_twin,
    with_kernels,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.model import ZayaModel

    Twin = transformers.ZayaForCausalLM

torch.set_num_threads(1)
LOGITS = 2e-5
GRADIENTS = 1e-4
BATCH, SEQUENCE = 2, 19


SKIP_BIAS = "balancing_biases"


def loaded(folder: Path) -> Twin:
    """transformers' own loading; without a padding id, whose gradient it would drop, and without
    grouped products, which refuse odd widths."""
    load: Any = transformers.ZayaForCausalLM.from_pretrained
    model, report = load(
        folder,
        dtype=torch.float32,
        pad_token_id=None,
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model, transformers.ZayaForCausalLM)
    return model


def theirs_of(folder: Path) -> Twin:
    """`loaded`, with the skip class's biases put back (see the test of that reset below)."""
    model = loaded(folder)
    stored = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(SKIP_BIAS):
                assert torch.equal(buffer[:-1], stored[name][:-1])
                buffer.copy_(stored[name])
    return model


def test_transformers_resets_the_skip_bias_when_loading(tmp_path: Path) -> None:
    """_init_weights writes -1 to the last class after the file was read (transformers 5.23.0). A
    trained skip bias is lost there; should this fail, they have mended it."""
    ours = random_model(TINY)
    force_skips(ours, 6.0)
    to_hf(ours, tmp_path / "model")
    found = [b[-1] for n, b in loaded(tmp_path / "model").named_buffers() if n.endswith(SKIP_BIAS)]
    assert found == [-1.0] * TINY.num_layers


def logit_gap(ours: ZayaModel, theirs: Twin, tokens: Tensor) -> float:
    with torch.no_grad():
        found, expected = ours.logits(tokens), theirs(tokens, use_cache=False).logits
    assert float(expected.std()) > 0.05, "logits too small to tell anything"
    return float((found - expected).abs().max())


def gradient_gaps(ours: ZayaModel, theirs: Twin, tokens: Tensor) -> dict[str, float]:
    """Relative error of the gradient of every parameter."""
    labels = next_tokens(tokens)
    layout = packed([[tokens.shape[1]]] * tokens.shape[0], tokens.shape[1])
    loss = ours(tokens, labels, layout).loss / int((labels >= 0).sum())
    reference = theirs(tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    torch.autograd.backward(loss)
    torch.autograd.backward(reference)
    shapes = {name: tuple(value.shape) for name, value in ours.named_parameters()}
    gaps = {}
    for name in tensor_names(shapes, ours.config).values():
        found = ours.get_parameter(name.ours).grad
        expected = theirs.get_parameter(name.theirs[0]).grad
        assert found is not None and expected is not None, name.ours
        gap = found.reshape(name.their_shape) - expected
        gaps[name.ours] = float(gap.norm() / expected.norm().clamp_min(1e-7))
    assert len(gaps) == len(list(theirs.parameters()))
    return gaps


def assert_same_model(ours: ZayaModel, theirs: Twin, tokens: Tensor) -> None:
    assert logit_gap(ours, theirs, tokens) <= LOGITS
    gaps = gradient_gaps(ours, theirs, tokens)
    assert {name: gap for name, gap in gaps.items() if not gap <= GRADIENTS} == {}


@pytest.mark.parametrize("name", VARIANTS)
def test_their_weights_in_our_model(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    theirs = random_twin(config, seed=len(name))
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path)
    assert ours.config == config
    tokens = random_tokens(config, BATCH, SEQUENCE)
    assert_same_model(ours, theirs, tokens)
    reference = with_kernels(ours, REFERENCE)
    assert logit_gap(reference, theirs, tokens) <= LOGITS


@pytest.mark.parametrize("name", VARIANTS)
def test_our_weights_in_their_model(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    ours = random_model(config, seed=len(name))
    to_hf(ours, tmp_path / "model")
    theirs = theirs_of(tmp_path / "model")
    assert_same_model(ours, theirs, random_tokens(config, BATCH, SEQUENCE, seed=1))


def test_products_in_onednn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that large fp32 products take on a CPU."""
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", 1)
    ours = random_model(TINY)
    to_hf(ours, tmp_path / "model")
    assert_same_model(ours, theirs_of(tmp_path / "model"), random_tokens(TINY, BATCH, SEQUENCE))


def test_kernels_in_c(tmp_path: Path) -> None:
    ours = random_model(TINY)
    to_hf(ours, tmp_path / "model")
    tokens = random_tokens(TINY, BATCH, SEQUENCE)
    assert_same_model(with_kernels(ours, NATIVE), theirs_of(tmp_path / "model"), tokens)


def test_a_short_row(tmp_path: Path) -> None:
    """One token: every tap but the newest lies before the document."""
    config = VARIANTS["four_kv_heads"]
    ours = random_model(config)
    to_hf(ours, tmp_path / "model")
    assert logit_gap(ours, theirs_of(tmp_path / "model"), random_tokens(config, 3, 1)) <= LOGITS


def force_skips(model: torch.nn.Module, amount: float = 10.0) -> None:
    """Every token of every layer chooses the class without an expert."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "balancing_bias" in name:
                buffer[-1] += amount


def test_all_skipped_equals_transformers(tmp_path: Path) -> None:
    ours = random_model(TINY)
    force_skips(ours)
    to_hf(ours, tmp_path / "model")
    theirs = theirs_of(tmp_path / "model")
    tokens = random_tokens(TINY, BATCH, SEQUENCE)
    labels, layout = next_tokens(tokens), packed([[SEQUENCE]] * BATCH, SEQUENCE)
    load = ours(tokens, labels, layout).load
    assert load.sum() == load[:, -1].sum() == TINY.num_layers * tokens.numel()
    assert_same_model(ours, theirs, tokens)


def test_some_skipped_equals_transformers(tmp_path: Path) -> None:
    ours = random_model(TINY)
    force_skips(ours, 1.05)
    to_hf(ours, tmp_path / "model")
    tokens = random_tokens(TINY, BATCH, SEQUENCE)
    load = ours(tokens, next_tokens(tokens), packed([[SEQUENCE]] * BATCH, SEQUENCE)).load
    assert (load[:, -1] > 0).any() and (load[:, :-1] > 0).any()
    assert_same_model(ours, theirs_of(tmp_path / "model"), tokens)


def expected_skip_stream(model: ZayaModel, tokens: Tensor) -> Tensor:
    """Logits of a model all of whose MoE blocks return probability x normalised input."""
    outputs = []
    for layer in blocks(model):
        layer.moe.register_forward_hook(
            # The first argument makes the block's input: the stream and its norm.
            lambda module, given, result: outputs.append((given[0]()[1], result[0], result[2]))
        )
    logits = model.logits(tokens)
    for normed, out, routing in outputs:
        assert (routing.choice == model.config.num_experts).all()
        torch.testing.assert_close(out, normed * routing.probability.unsqueeze(-1))
    assert len(outputs) == model.config.num_layers
    return logits


def test_identity_skips_pass_the_scaled_block_input() -> None:
    config = replace(TINY, skip_output="identity")
    model, zero = random_model(config), random_model(TINY)
    force_skips(model)
    force_skips(zero)
    tokens = random_tokens(config, BATCH, SEQUENCE)
    difference = expected_skip_stream(model, tokens) - zero.logits(tokens)
    assert float(difference.abs().max().detach()) > 1e-2


def test_bf16_parameters_keep_bf16_accuracy(tmp_path: Path) -> None:
    config = TINY
    ours = random_model(config)
    to_hf(ours, tmp_path / "model")
    tokens = random_tokens(config, BATCH, SEQUENCE)
    low = from_hf(tmp_path / "model", torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        error = (low.logits(tokens) - ours.logits(tokens)).norm() / ours.logits(tokens).norm()
    assert float(error) <= 0.05


def round_trip(config: ModelConfig, folder: Path) -> None:
    ours = random_model(config)
    to_hf(ours, folder / "first")
    again = from_hf(folder / "first")
    to_hf(again, folder / "second")
    assert again.config == ours.config
    state = ours.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    names = sorted(file.name for file in (folder / "first").iterdir())
    assert names == sorted(file.name for file in (folder / "second").iterdir())
    for name in names:
        assert (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_export_import_export_is_bitwise(name: str, tmp_path: Path) -> None:
    round_trip(VARIANTS[name], tmp_path)


def test_what_transformers_saves_again_is_read_bitwise(tmp_path: Path) -> None:
    ours = random_model(TINY)
    to_hf(ours, tmp_path / "ours")
    theirs_of(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = from_hf(tmp_path / "theirs")
    assert again.config == ours.config
    state = ours.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
