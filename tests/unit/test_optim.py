"""Parameter table, AdamW and the balancing controller on one process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tests.helpers.optim import give_gradients, randn, shards_of
from tests.helpers.tiny import tiny
from zaya_train.config.schema import AdamWConfig, BalancingConfig
from zaya_train.model.init import initialise
from zaya_train.model.zaya import ZayaModel
from zaya_train.optim import table as optimizer_table
from zaya_train.optim.adamw import AdamW
from zaya_train.optim.balancing import BalancingController
from zaya_train.optim.optimizer import Optimizer
from zaya_train.optim.table import MATRIX, PER_EXPERT, RULES, assign, summary

if TYPE_CHECKING:
    from zaya_train.optim.exchange import Groups

# Parameter table


@pytest.mark.parametrize("skip_class", [True, False])
def test_every_parameter_of_a_model_has_one_row(skip_class: bool) -> None:
    with torch.device("meta"):
        model = ZayaModel(replace(tiny().model, skip_class=skip_class))
    named = dict(model.named_parameters())
    table = assign(named)
    assert table.keys() == named.keys()
    for name, rule in table.items():
        leaf = name.rsplit(".", 1)[-1]
        is_matrix = named[name].dim() >= 2 and leaf not in ("embedding", "conv_depthwise")
        assert rule.optimizer == ("muon" if is_matrix else "adamw"), name
        assert rule.decays is (is_matrix or leaf == "embedding"), name
    used = {rule.pattern for rule in table.values()}
    assert used == {rule.pattern for rule in RULES}


@pytest.mark.parametrize(
    "name", ["layers.0.attention.gate", "head", "layers.x.moe.experts.down", ""]
)
def test_unknown_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"parameter {name} must match one row.*none"):
        assign(["embedding", name])


def test_a_parameter_of_two_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = (*RULES, replace(RULES[0], optimizer="muon"))
    monkeypatch.setattr("zaya_train.optim.table.RULES", doubled)
    with pytest.raises(ValueError, match="embedding, embedding"):
        assign(["embedding"])


def test_summary_counts_every_element_once() -> None:
    with torch.device("meta"):
        model = ZayaModel(tiny().model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    lines = summary(assign(shapes), shapes)
    elements = sum(int(line.split(" elements")[0].split()[-1].replace(",", "")) for line in lines)
    assert elements == sum(p.numel() for p in model.parameters())
    assert len(lines) == len(RULES)


def test_every_matrix_of_muon_has_a_declared_view() -> None:
    for rule in RULES:
        assert (rule.view is not None) == (rule.optimizer == "muon")
    with torch.device("meta"):
        model = ZayaModel(tiny().model)
    table = assign(name for name, _ in model.named_parameters())
    matrices = {
        name: view.split(p) for name, p in model.named_parameters() if (view := table[name].view)
    }
    layer = "layers.1."
    # Six heads of eight channels and two taps; three experts.
    assert [list(m.shape) for m in matrices[layer + "attention.conv_grouped"]] == [[8, 16]] * 6
    assert [list(m.shape) for m in matrices[layer + "moe.experts.gate_up"]] == [[16, 16]] * 3
    assert [list(m.shape) for m in matrices[layer + "moe.experts.down"]] == [[16, 8]] * 3
    assert [list(m.shape) for m in matrices[layer + "moe.router.out"]] == [[4, 8]]
    assert [list(m.shape) for m in matrices[layer + "attention.q_proj"]] == [[32, 16]]


def test_matrices_are_views_of_the_parameter() -> None:
    for shape, view in (((3, 4), MATRIX), ((2, 3, 4), PER_EXPERT)):
        x = torch.zeros(shape)
        for matrix in view.split(x):
            matrix.add_(1)
        assert bool(x.eq(1).all())


# AdamW


def test_adamw_equals_torch_over_five_steps() -> None:
    values = [randn(5, 3, seed=1), randn(7, seed=2), randn(2, 2, seed=3)]
    decays = [True, False, True]
    config = AdamWConfig(learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    shards = shards_of(values)
    ours = AdamW(shards, decays, config)
    theirs = [Parameter(value.clone()) for value in values]
    torch_adamw = torch.optim.AdamW(
        [
            {"params": [theirs[0], theirs[2]], "weight_decay": 0.3},
            {"params": [theirs[1]], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    for step in range(5):
        rate = 0.1 / (step + 1)
        for group in torch_adamw.param_groups:
            group["lr"] = rate
        give_gradients([s.parameter for s in shards], step)
        give_gradients(theirs, step)
        ours.step(rate)
        torch_adamw.step()
    for shard, reference in zip(shards, theirs, strict=True):
        torch.testing.assert_close(shard.parameter, reference, rtol=1e-6, atol=1e-7)
    assert int(ours.steps) == 5


def test_adamw_counts_steps_of_parameters_without_gradient() -> None:
    shards = shards_of([randn(4)])
    optimizer = AdamW(shards, [True], AdamWConfig(learning_rate=0.1, weight_decay=0.5))
    before = shards[0].local.clone()
    optimizer.step(0.1)
    torch.testing.assert_close(shards[0].local, before * (1 - 0.1 * 0.5))
    assert int(optimizer.steps) == 1


def test_adamw_corrects_its_bias_by_the_steps_it_was_given() -> None:
    """As after loading a checkpoint: the counter alone says how many updates were made."""
    config = AdamWConfig(learning_rate=0.1, beta1=0.9, beta2=0.99)
    fresh, resumed = shards_of([torch.zeros(2)]), shards_of([torch.zeros(2)])
    first, later = AdamW(fresh, [False], config), AdamW(resumed, [False], config)
    later.steps.fill_(9)
    for shard, optimizer in ((fresh[0], first), (resumed[0], later)):
        shard.parameter.grad = torch.ones(2)
        optimizer.step(0.1)
    expected = {"fresh": 1.0, "resumed": 0.1 / (1 - 0.9**10) / math.sqrt(0.01 / (1 - 0.99**10))}
    torch.testing.assert_close(fresh[0].local, torch.full((2,), -0.1 * expected["fresh"]))
    torch.testing.assert_close(resumed[0].local, torch.full((2,), -0.1 * expected["resumed"]))
    assert (int(first.steps), int(later.steps)) == (1, 10)


# Balancing


def controller(experts: int = 4, **changes: Any) -> tuple[BalancingController, list[Tensor]]:
    biases = [torch.zeros(experts + 1) for _ in range(2)]
    for bias in biases:
        bias[-1] = -1.0
    config = BalancingConfig(**{"learning_rate": 0.01, **changes})
    return BalancingController(biases, experts, config), biases


LOAD = torch.tensor([[70.0, 10.0, 10.0, 10.0, 0.0], [0.0, 30.0, 30.0, 30.0, 10.0]])


def test_overloaded_experts_fall_and_idle_ones_rise() -> None:
    balancing, biases = controller()
    balancing.step(LOAD)
    # AdamW's first step is the learning rate against the gradient's sign.
    expected = [[-0.01, 0.01, 0.01, 0.01, -1.0], [0.01, -0.01, -0.01, -0.01, -1.0]]
    torch.testing.assert_close(torch.stack(biases), torch.tensor(expected), rtol=0, atol=1e-6)


def test_gradient_is_the_share_of_all_tokens_less_an_even_one() -> None:
    balancing, biases = controller()
    parameters = [Parameter(bias.clone()) for bias in biases]
    reference = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(5):
        load = randn(2, 5, seed=step).abs() * 100
        for parameter, row in zip(parameters, load, strict=True):
            parameter.grad = row / row.sum() - 0.25
            parameter.grad[-1] = 0
        balancing.step(load)
        reference.step()
    torch.testing.assert_close(torch.stack(biases), torch.stack([p.data for p in parameters]))


def test_skip_bias_rests_unless_it_has_a_target() -> None:
    balancing, biases = controller()
    for _ in range(3):
        balancing.step(torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0]] * 2))
    assert [float(bias[-1]) for bias in biases] == [-1.0, -1.0]


def loads(biases: list[Tensor], step: int) -> Tensor:
    """[2, 5] choices of 4,000 tokens whose scores do not depend on the class."""
    choices = [(randn(4000, 5, seed=step) + bias).argmax(dim=1) for bias in biases]
    return torch.stack([choice.bincount(minlength=5) for choice in choices]).float()


@pytest.mark.parametrize("target", [0.0, 0.1, 0.6])
def test_skip_class_reaches_its_target_and_experts_share_the_rest(target: float) -> None:
    balancing, biases = controller(skip_target=target)
    for step in range(600):
        balancing.step(loads(biases, step))
    share = torch.stack([loads(biases, 1000 + i) for i in range(10)]).mean(0) / 4000
    expected = torch.tensor([*[(1 - target) / 4] * 4, target])
    torch.testing.assert_close(share, expected.expand(2, 5), rtol=0, atol=0.03)


def test_balance_depends_on_shares_and_a_step_without_tokens_is_finite() -> None:
    (once, first), (scaled, second) = controller(), controller()
    once.step(LOAD)
    scaled.step(1000 * LOAD)
    torch.testing.assert_close(first, second)
    once.step(torch.zeros(2, 5))
    assert all(bool(bias.isfinite().all()) for bias in first)


# All together


def model_and_optimizer(alone: Groups) -> tuple[ZayaModel, Optimizer]:
    config = tiny()
    model = ZayaModel(config.model)
    initialise(model, seed=0)
    optimizer = Optimizer(
        dict(model.named_parameters()),
        [buffer for _, buffer in model.named_buffers()],
        config.model.num_experts,
        config.optim,
        alone,
        "eager",
    )
    return model, optimizer


def test_a_step_moves_every_parameter_and_every_bias(alone: Groups) -> None:
    model, optimizer = model_and_optimizer(alone)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(list(model.parameters()), 0)
    load = torch.tensor([[8.0, 2.0, 2.0, 1.0]] * 2)
    optimizer.step(0.1, 0.1, load)
    unmoved = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert unmoved == []
    for _, bias in model.named_buffers():
        assert float(bias[0]) < 0 < float(bias[1])


@pytest.mark.parametrize("spared", ["nothing", "router", "experts"])
def test_decay_reaches_exactly_what_the_table_says(
    spared: str, alone: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [replace(r, decays=r.decays and r.what != spared) for r in RULES]
    assert (rules != list(RULES)) is (spared != "nothing")
    monkeypatch.setattr(optimizer_table, "RULES", rules)
    model, optimizer = model_and_optimizer(alone)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(0.1, 0.1, torch.ones(2, 4))
    for name, parameter in model.named_parameters():
        kept = 1 - 0.1 * 0.1 if optimizer.table[name].decays else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept, msg=name)


def test_state_names_are_stable_and_cover_every_parameter(alone: Groups) -> None:
    model, optimizer = model_and_optimizer(alone)
    fresh = optimizer.tensors()
    give_gradients(list(model.parameters()), 0)
    optimizer.step(0.1, 0.1, torch.ones(2, 4))
    stepped = optimizer.tensors()
    assert fresh.keys() == stepped.keys()
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in stepped.items()}
    for name, parameter in model.named_parameters():
        own = [key for key in stepped if f".{name}." in key]
        assert len(own) == (1 if optimizer.table[name].optimizer == "muon" else 2), name
        assert all(stepped[key].shape == parameter.shape for key in own)
        assert all(bool(stepped[key].any()) for key in own)
    # What is handed out is the state itself, so that loading into it is loading.
    stepped["optim.adamw.steps"].fill_(41)
    assert int(optimizer.adamw.steps) == 41
    key = "optim.muon.layers.0.attention.q_proj.momentum"
    stepped[key].fill_(7.0)
    assert optimizer.tensors()[key].eq(7.0).all()
