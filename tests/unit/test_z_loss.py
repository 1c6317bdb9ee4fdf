"""The z-loss through the whole model: against its formula, and apart from the cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from zaya_train.config.schema import KernelsConfig, NativeKernelName

from ..helpers.models import TINY, next_tokens, packed, random_model, random_tokens, with_kernels

if TYPE_CHECKING:
    from zaya_train.model import ZayaModel

torch.set_num_threads(1)

COEFFICIENT = 0.3
TOKENS = random_tokens(TINY, 2, 11)
LAYOUT = packed([[5, 6], [1, 8]], 11)
LABELS = next_tokens(TOKENS)
"""Of either row the last token supervises nothing."""


def by_formula(model: ZayaModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and z-loss of the whole logits."""
    logits, kept = model.logits(TOKENS, LAYOUT), LABELS >= 0
    sizes = torch.log(torch.exp(logits).sum(dim=-1))[kept]
    chosen = logits[kept].gather(1, LABELS[kept][:, None]).squeeze(1)
    return (sizes - chosen).sum(), COEFFICIENT * (sizes * sizes).sum()


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_as_its_formula_in_float64(backend: NativeKernelName) -> None:
    kernels = KernelsConfig(linear_cross_entropy=backend)
    model = with_kernels(random_model(TINY).double(), kernels)
    out = model(TOKENS, LABELS, LAYOUT, COEFFICIENT)
    cross_entropy, z = by_formula(model)
    torch.testing.assert_close(out.z_loss, z, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, cross_entropy + z, rtol=1e-12, atol=0)
    assert not out.z_loss.requires_grad
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(out.loss, parameters)
    expected = torch.autograd.grad(cross_entropy + z, parameters)
    without = torch.autograd.grad(by_formula(model)[0], parameters)
    for name, own, formula in zip(names, found, expected, strict=True):
        torch.testing.assert_close(own, formula, rtol=1e-9, atol=1e-11, msg=name)
    assert not torch.allclose(found[0], without[0], rtol=0.1)


@pytest.mark.parametrize("backend", ["eager", "native", "reference"])
def test_what_was_added_is_told_apart(backend: NativeKernelName) -> None:
    """fp32, whose rounding the sums of a few tokens keep well below 1e-6."""
    model = with_kernels(random_model(TINY), KernelsConfig(linear_cross_entropy=backend))
    plain, out = (model(TOKENS, LABELS, LAYOUT, z) for z in (0.0, COEFFICIENT))
    exact = by_formula(random_model(TINY).double())[1]
    assert float(plain.z_loss) == 0.0 < float(out.z_loss)
    torch.testing.assert_close(out.z_loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.loss - out.z_loss, plain.loss, rtol=1e-6, atol=0)


def test_nothing_is_added_unless_asked_for() -> None:
    """Evaluation, generation and exports call the model without it."""
    model = random_model(TINY)
    out = model(TOKENS, LABELS, LAYOUT)
    assert torch.equal(out.loss, model(TOKENS, LABELS, LAYOUT, 0.0).loss)
    torch.testing.assert_close(out.loss, by_formula(model)[0], rtol=1e-5, atol=0)
