from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from zaya_train.model import ZayaModel, initialise

from ..helpers.models import TINY, blocks, random_tokens

if TYPE_CHECKING:
    from torch import Tensor

torch.set_num_threads(1)
CONFIG = replace(TINY, hidden_size=64, num_layers=2, router_size=32, vocab_size=2048)
DEPTH = (2 * CONFIG.num_layers) ** -0.5
CHANNELS = CONFIG.head_dim


def fresh(seed: int = 0) -> ZayaModel:
    model = ZayaModel(CONFIG)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    initialise(model, seed)
    return model


# leaf -> standard deviation, as the table of model/init.py.
STD = {
    "embedding": CONFIG.init_std,
    "attention.q_proj": 64**-0.5,
    "attention.k_proj": 64**-0.5,
    "attention.v_now_proj": 64**-0.5,
    "attention.v_delayed_proj": 64**-0.5,
    "attention.out_proj": DEPTH * 32**-0.5,
    "attention.conv_depthwise": 2**-0.5,
    "attention.conv_grouped": (2 * CHANNELS) ** -0.5,
    "moe.experts.gate_up": 64**-0.5,
    "moe.experts.down": DEPTH * 24**-0.5,
    "moe.router.down": 64**-0.5,
    "moe.router.fc1": 32**-0.5,
    "moe.router.fc2": 32**-0.5,
    "moe.router.out": CONFIG.init_std,
}


def leaf(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def test_every_tensor_follows_the_table() -> None:
    model = fresh()
    constant = {}
    for name, parameter in model.named_parameters():
        if leaf(name) in STD:
            spread = float(parameter.detach().std())
            # Four standard errors of a standard deviation's estimate.
            slack = 4 / (2 * parameter.numel()) ** 0.5
            assert spread == pytest.approx(STD[leaf(name)], rel=slack), name
            assert abs(float(parameter.detach().mean())) <= 4 * spread / parameter.numel() ** 0.5
        else:
            (value,) = set(parameter.flatten().tolist())
            constant[leaf(name)] = value
    zero = {name for name, value in constant.items() if value == 0.0}
    assert zero == {name for name in constant if name.endswith("bias")}
    assert all(value == 1.0 for name, value in constant.items() if name not in zero)
    assert {"attention.temperature", "moe.router.depth_scale", "norm.weight"} <= constant.keys()


def test_the_skip_class_starts_at_minus_one() -> None:
    for layer in blocks(fresh()):
        assert layer.moe.router.balancing_bias.tolist() == [0.0] * CONFIG.num_experts + [-1.0]
    plain = ZayaModel(replace(CONFIG, skip_class=False))
    initialise(plain, 0)
    assert not blocks(plain)[0].moe.router.balancing_bias.any()


def test_values_depend_on_seed_and_name_alone() -> None:
    one, again, other = fresh(3), fresh(3), fresh(4)
    for (name, a), b, c in zip(
        one.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (leaf(name) not in STD), name
    deeper = ZayaModel(replace(CONFIG, num_experts=CONFIG.num_experts, num_layers=2, vocab_size=9))
    initialise(deeper, 3)
    assert torch.equal(blocks(deeper)[1].moe.experts.gate_up, blocks(one)[1].moe.experts.gate_up)
    first, second = (layer.attention.q_proj for layer in blocks(one))
    assert not torch.equal(first, second)
    assert not torch.equal(first[: CONFIG.head_dim], blocks(one)[0].attention.k_proj[:CHANNELS])


def test_write_receives_every_full_tensor() -> None:
    """What a sharded model stores: here the first half of the rows."""
    expected = dict(fresh().named_parameters())
    model = ZayaModel(CONFIG)
    seen: list[tuple[int, ...]] = []

    def first_rows(target: Tensor, full: Tensor) -> None:
        seen.append(tuple(full.shape))
        target.zero_()
        target[: len(full) // 2].copy_(full[: len(full) // 2])

    initialise(model, 0, first_rows)
    assert seen == [tuple(p.shape) for p in model.parameters()]
    for name, parameter in model.named_parameters():
        half = len(parameter) // 2
        assert torch.equal(parameter[:half], expected[name][:half]) and not parameter[half:].any()


def test_an_unknown_buffer_is_refused() -> None:
    model = ZayaModel(CONFIG)
    model.register_buffer("extra", torch.zeros(1))
    with pytest.raises(KeyError, match="no initial value is defined for buffer extra"):
        initialise(model, 0)


def test_a_fresh_model_predicts_about_uniformly() -> None:
    model = fresh()
    tokens = random_tokens(CONFIG, 2, 32)
    with torch.no_grad():
        scores = model.logits(tokens).log_softmax(dim=-1)
    entropy = -(scores.exp() * scores).sum(dim=-1).mean()
    assert float(entropy) == pytest.approx(float(torch.tensor(CONFIG.vocab_size).log()), abs=0.1)
