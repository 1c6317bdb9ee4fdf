"""Muon on one process: its formula, torch's Muon, stacks, momentum, rounds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tests.helpers.optim import give_gradients, randn, shards_of
from zaya_train.config.schema import MuonConfig
from zaya_train.optim.muon import Muon
from zaya_train.optim.table import MATRIX, PER_EXPERT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zaya_train.optim.exchange import Groups
    from zaya_train.optim.shards import Shard


QUINTIC = (3.4445, -4.7750, 2.0315)


def muon_config(**changes: Any) -> MuonConfig:
    return MuonConfig(**{"learning_rate": 0.1, "newton_schulz_dtype": "fp32", **changes})


def muon_of(
    shards: Sequence[Shard], config: MuonConfig, groups: Groups, backend: str = "eager"
) -> Muon:
    """Three dimensions are a stack of matrices."""
    views = [PER_EXPERT if shard.parameter.dim() == 3 else MATRIX for shard in shards]
    return Muon(shards, views, [True] * len(shards), config, groups, backend)


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
def test_muon_follows_its_formula(nesterov: bool, backend: str, alone: Groups) -> None:
    values = [randn(6, 10, seed=1), randn(10, 6, seed=2), randn(6, 10, seed=3)]
    config = muon_config(momentum=0.9, nesterov=nesterov, weight_decay=0.2, update_rms=0.3)
    shards = shards_of(values)
    muon = muon_of(shards, config, alone, backend)
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


def test_muon_takes_the_polynomials_of_its_configuration(alone: Groups) -> None:
    listed = ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5), (1.5, -0.5, 0.1))
    config = muon_config(newton_schulz_schedule=listed, weight_decay=0.0)
    (shard,) = shards_of([torch.zeros(6, 10)])
    give_gradients([shard.parameter], 0)
    gradient = shard.parameter.grad
    assert gradient is not None
    u, s, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in listed:
        s = a * s + b * s**3 + c * s**5
    muon_of([shard], config, alone).step(0.1)
    expected = -0.1 * 0.2 * math.sqrt(10) * (u * s) @ vh
    torch.testing.assert_close(shard.local.double(), expected, rtol=0, atol=1e-6)


def test_muon_equals_torchs_muon_in_bf16(alone: Groups) -> None:
    values = [randn(16, 40, seed=1), randn(40, 16, seed=2), randn(24, 24, seed=3)]
    config = muon_config(newton_schulz_dtype="bf16", weight_decay=0.1)
    shards = shards_of(values)
    ours = muon_of(shards, config, alone)
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


def test_a_stack_is_a_loop_over_its_matrices(alone: Groups) -> None:
    stack = randn(5, 6, 12, seed=4)
    together, apart = shards_of([stack]), shards_of(list(stack))
    config = muon_config()
    many, one = muon_of(apart, config, alone), muon_of(together, config, alone)
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
def test_updates_have_the_rms_of_adamws(shape: tuple[int, ...], alone: Groups) -> None:
    shards = shards_of([torch.zeros(shape)])
    muon = muon_of(shards, muon_config(weight_decay=0.0), alone)
    give_gradients([shards[0].parameter], 0)
    muon.step(1.0)
    rms = float(shards[0].local.square().mean().sqrt())
    # Singular values end within 0.7 to 1.2.
    assert 0.7 * 0.2 < rms < 1.2 * 0.2


def test_muon_without_a_gradient_only_decays(alone: Groups) -> None:
    shards = shards_of([randn(4, 6), randn(2, 4, 6, seed=1)])
    before = [shard.local.clone() for shard in shards]
    muon_of(shards, muon_config(weight_decay=0.5), alone).step(0.1)
    for shard, value in zip(shards, before, strict=True):
        torch.testing.assert_close(shard.local, value * (1 - 0.1 * 0.5))


def test_only_what_is_to_decay_does(alone: Groups) -> None:
    shards = shards_of([randn(4, 6), randn(2, 4, 6, seed=1), randn(6, 4, seed=2)])
    before = [shard.local.clone() for shard in shards]
    views = [MATRIX, PER_EXPERT, MATRIX]
    muon = Muon(shards, views, [False, True, False], muon_config(weight_decay=0.5), alone, "eager")
    muon.step(0.1)
    for shard, value, factor in zip(shards, before, (1.0, 1 - 0.1 * 0.5, 1.0), strict=True):
        torch.testing.assert_close(shard.local, value * factor)


def test_bf16_momentum_is_rounded_once_a_step_and_follows_fp32(alone: Groups) -> None:
    values = [randn(24, 40, seed=1), randn(3, 16, 24, seed=2)]
    wide, narrow = shards_of(values), shards_of(values)
    full = muon_of(wide, muon_config(), alone)
    half = muon_of(narrow, muon_config(momentum_dtype="bf16"), alone)
    expected = [torch.zeros_like(value) for value in values]
    for step in range(20):
        give_gradients([s.parameter for s in wide], step)
        give_gradients([s.parameter for s in narrow], step)
        full.step(0.01)
        half.step(0.01)
        for momentum, shard in zip(expected, narrow, strict=True):
            momentum.copy_((0.95 * momentum + shard.grad).bfloat16())
    for momentum, reference in zip(half.momentum, expected, strict=True):
        assert momentum.dtype == torch.bfloat16
        # A unit in the last place where two roundings of the fp32 sum meet a tie.
        torch.testing.assert_close(momentum.float(), reference, rtol=2**-7, atol=0)
        assert float((momentum.float() == reference).float().mean()) > 0.99
    for a, b, start in zip(wide, narrow, values, strict=True):
        assert float((a.local - b.local).norm() / (a.local - start).norm()) < 0.02


def test_rounds_change_nothing(alone: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [randn(6, 10, seed=1), randn(4, 6, 10, seed=2), randn(10, 6, seed=3)]
    once, often = shards_of(values), shards_of(values)
    together = muon_of(once, muon_config(), alone)
    monkeypatch.setattr("zaya_train.optim.owners.ROUND_ELEMENTS", 60)
    apart = muon_of(often, muon_config(), alone)
    assert (len(together.plan.rounds), len(apart.plan.rounds)) == (1, 6)
    for step in range(2):
        give_gradients([s.parameter for s in once], step)
        give_gradients([s.parameter for s in often], step)
        together.step(0.1)
        apart.step(0.1)
    for a, b in zip(once, often, strict=True):
        torch.testing.assert_close(a.local, b.local, rtol=1e-6, atol=1e-7)


def test_a_view_that_does_not_fit_is_refused_by_name(alone: Groups) -> None:
    shards = shards_of([randn(4, 6)])
    with pytest.raises(ValueError, match=r"parameter p0 of shape \[4, 6\].*per expert.*3 dim"):
        Muon(shards, [PER_EXPERT], [True], muon_config(), alone, "eager")
