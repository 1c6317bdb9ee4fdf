"""Parameter table, AdamW, Muon and the balancing controller on one process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.nn import Parameter

from tests.helpers.tiny import tiny
from zaya_train.config.schema import AdamWConfig, BalancingConfig, MuonConfig
from zaya_train.model.init import initialise
from zaya_train.model.zaya import ZayaModel
from zaya_train.optim.adamw import AdamW
from zaya_train.optim.balancing import BalancingController
from zaya_train.optim.muon import Muon
from zaya_train.optim.optimizer import Optimizer
from zaya_train.optim.shards import Shard
from zaya_train.optim.table import RULES, assign, summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed import ProcessGroup

QUINTIC = (3.4445, -4.7750, 2.0315)


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessGroup]:
    """The group of one rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shards_of(values: Sequence[Tensor]) -> list[Shard]:
    return [Shard.of(f"p{i}", Parameter(value.clone())) for i, value in enumerate(values)]


def give_gradients(parameters: Sequence[Tensor], step: int) -> None:
    for i, parameter in enumerate(parameters):
        parameter.grad = randn(*parameter.shape, seed=1000 * step + i)


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


# Muon


def muon_config(**changes: Any) -> MuonConfig:
    return MuonConfig(**{"learning_rate": 0.1, "newton_schulz_dtype": "fp32", **changes})


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz by its formula in float64."""
    a, b, c = QUINTIC
    x: Tensor = matrix.double()
    x = x / torch.linalg.matrix_norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
    return x


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_muon_follows_its_formula(nesterov: bool, backend: str, alone: ProcessGroup) -> None:
    values = [randn(6, 10, seed=1), randn(10, 6, seed=2), randn(6, 10, seed=3)]
    config = muon_config(momentum=0.9, nesterov=nesterov, weight_decay=0.2, update_rms=0.3)
    shards = shards_of(values)
    muon = Muon(shards, config, alone, backend)
    expected = [value.double() for value in values]
    momenta = [torch.zeros_like(value) for value in expected]
    for step in range(3):
        give_gradients([s.parameter for s in shards], step)
        muon.step(0.1)
        for i, shard in enumerate(shards):
            assert shard.parameter.grad is not None
            gradient = shard.parameter.grad.double()
            momenta[i] = 0.9 * momenta[i] + gradient
            direction = gradient + 0.9 * momenta[i] if nesterov else momenta[i]
            scale = 0.1 * 0.3 * math.sqrt(10)
            expected[i] = expected[i] * (1 - 0.1 * 0.2) - scale * orthogonal(direction)
    for shard, reference in zip(shards, expected, strict=True):
        # fp32 sums of ten products through five quintic steps lose about three digits.
        torch.testing.assert_close(shard.local.double(), reference, rtol=0, atol=2e-4)
    for momentum, reference in zip(muon.momentum, momenta, strict=True):
        torch.testing.assert_close(momentum.double(), reference, rtol=1e-5, atol=1e-5)


def test_muon_equals_torchs_muon_in_bf16(alone: ProcessGroup) -> None:
    values = [randn(16, 40, seed=1), randn(40, 16, seed=2), randn(24, 24, seed=3)]
    config = muon_config(newton_schulz_dtype="bf16", weight_decay=0.1)
    shards = shards_of(values)
    ours = Muon(shards, config, alone, "eager")
    theirs = [Parameter(value.clone()) for value in values]
    reference = torch.optim.Muon(
        theirs,
        lr=0.1,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        ns_coefficients=QUINTIC,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(3):
        give_gradients([s.parameter for s in shards], step)
        give_gradients(theirs, step)
        ours.step(0.1)
        reference.step()  # type: ignore[no-untyped-call]
    for shard, parameter, start in zip(shards, theirs, values, strict=True):
        moved = (parameter.detach() - start).norm()
        # bf16 keeps 8 bits: 0.4 % a product, over 15 products and 3 steps.
        assert float((shard.local - parameter.detach()).norm() / moved) < 0.03


def test_a_stack_is_a_loop_over_its_matrices(alone: ProcessGroup) -> None:
    stack = randn(5, 6, 12, seed=4)
    together, apart = shards_of([stack]), shards_of(list(stack))
    config = muon_config()
    many, one = Muon(apart, config, alone, "eager"), Muon(together, config, alone, "eager")
    for step in range(2):
        gradient = randn(5, 6, 12, seed=50 + step)
        together[0].parameter.grad = gradient
        for shard, part in zip(apart, gradient, strict=True):
            shard.parameter.grad = part.clone()
        many.step(0.1)
        one.step(0.1)
    for part, shard in zip(together[0].local, apart, strict=True):
        torch.testing.assert_close(part, shard.local, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (3, 32, 64)])
def test_updates_have_the_rms_of_adamws(shape: tuple[int, ...], alone: ProcessGroup) -> None:
    shards = shards_of([torch.zeros(shape)])
    muon = Muon(shards, muon_config(weight_decay=0.0), alone, "eager")
    give_gradients([shards[0].parameter], 0)
    muon.step(1.0)
    rms = float(shards[0].local.square().mean().sqrt())
    # Singular values end within 0.7 to 1.2.
    assert 0.7 * 0.2 < rms < 1.2 * 0.2


def test_muon_without_a_gradient_only_decays(alone: ProcessGroup) -> None:
    shards = shards_of([randn(4, 6), randn(2, 4, 6, seed=1)])
    before = [shard.local.clone() for shard in shards]
    Muon(shards, muon_config(weight_decay=0.5), alone, "eager").step(0.1)
    for shard, value in zip(shards, before, strict=True):
        torch.testing.assert_close(shard.local, value * (1 - 0.1 * 0.5))


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


def test_skip_bias_is_frozen_unless_asked() -> None:
    balancing, biases = controller()
    for _ in range(3):
        balancing.step(torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0]] * 2))
    assert [float(bias[-1]) for bias in biases] == [-1.0, -1.0]
    balancing, biases = controller(train_skip_bias=True)
    balancing.step(torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0]] * 2))
    assert all(float(bias[-1]) < -1.0 for bias in biases)


def test_balance_depends_on_shares_and_a_step_without_tokens_is_finite() -> None:
    (once, first), (scaled, second) = controller(), controller()
    once.step(LOAD)
    scaled.step(1000 * LOAD)
    torch.testing.assert_close(first, second)
    once.step(torch.zeros(2, 5))
    assert all(bool(bias.isfinite().all()) for bias in first)


# All together


def model_and_optimizer(alone: ProcessGroup) -> tuple[ZayaModel, Optimizer]:
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


def test_a_step_moves_every_parameter_and_every_bias(alone: ProcessGroup) -> None:
    model, optimizer = model_and_optimizer(alone)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(list(model.parameters()), 0)
    load = torch.tensor([[8.0, 2.0, 2.0, 1.0]] * 2)
    optimizer.step(0.1, 0.1, load)
    unmoved = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert unmoved == []
    for _, bias in model.named_buffers():
        assert float(bias[0]) < 0 < float(bias[1])


def test_decay_reaches_exactly_what_the_table_says(alone: ProcessGroup) -> None:
    model, optimizer = model_and_optimizer(alone)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(0.1, 0.1, torch.ones(2, 4))
    for name, parameter in model.named_parameters():
        kept = 1 - 0.1 * 0.1 if optimizer.table[name].decays else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept, msg=name)


def test_state_names_are_stable_and_cover_every_parameter(alone: ProcessGroup) -> None:
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
