from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels import products
from zaya_kernels.linear_cross_entropy import eager
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy

from zaya_train.config.labels import IGNORE_LABEL

from ..helpers.kernels import (
    assert_backends_agree,
    assert_low_precision,
    random,
    run_pass,
)
from ..helpers.paths import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

VOCAB, HIDDEN = 23, 6


def inputs_of(tokens: int, vocab: int = VOCAB) -> dict[str, Tensor]:
    return {"hidden": random(tokens, HIDDEN, seed=1), "weight": random(vocab, HIDDEN, seed=2)}


def labels_of(tokens: int, supervised: int, vocab: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[supervised:]] = IGNORE_LABEL
    return labels


def call(labels: Tensor, backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return [linear_cross_entropy(x["hidden"], x["weight"], labels, backend)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Four rows at a time, the weight in blocks of five."""
    monkeypatch.setattr(eager, "chunk_rows", lambda vocab, itemsize: 4)
    monkeypatch.setattr(eager, "VOCAB_BLOCK", 5)
    return 4


@pytest.mark.parametrize(
    ("tokens", "supervised"),
    [(1, 1), (4, 4), (5, 5), (8, 8), (9, 8), (17, 3), (30, 13)],
)
def test_eager_equals_reference(small_chunks: int, tokens: int, supervised: int) -> None:
    labels = labels_of(tokens, supervised)
    assert_backends_agree(lambda backend, x: call(labels, backend, x), inputs_of(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("onednn", [True, False])
def test_lower_precision(
    small_chunks: int, dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn:
        monkeypatch.setattr(products, "SMALLEST_PRODUCT", 1)
    labels = labels_of(30, 21)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    assert_low_precision(
        lambda backend, x: call(labels, backend, x), inputs_of(30), dtype, tolerance
    )


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_nothing_supervised_costs_nothing(backend: str) -> None:
    labels = torch.full((7,), IGNORE_LABEL)
    passed = run_pass(lambda name, x: call(labels, name, x), backend, inputs_of(7))
    assert float(passed.outputs[0]) == 0.0
    assert not any(grad.any() for grad in passed.gradients.values())


def test_z_loss_adds_the_squared_logarithm_of_the_sums(small_chunks: int) -> None:
    labels, inputs = labels_of(9, 6), inputs_of(9)

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [linear_cross_entropy(x["hidden"], x["weight"], labels, backend, 0.3)]

    assert_backends_agree(run, inputs)
    sums = (inputs["hidden"] @ inputs["weight"].t()).logsumexp(dim=-1)
    added = run("eager", inputs)[0] - call(labels, "eager", inputs)[0]
    expected = 0.3 * sums[labels != IGNORE_LABEL].square().sum()
    torch.testing.assert_close(added, expected)


def test_sum_of_the_negative_log_likelihood() -> None:
    labels, inputs = labels_of(9, 6), inputs_of(9)
    scores = (inputs["hidden"] @ inputs["weight"].t()).log_softmax(dim=-1)
    expected = -sum(
        float(scores[t, label]) for t, label in enumerate(labels.tolist()) if label >= 0
    )
    (loss,) = call(labels, "eager", inputs)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_extreme_logits_stay_finite() -> None:
    inputs = {name: value.float() * 1e3 for name, value in inputs_of(6).items()}
    labels = labels_of(6, 6)
    assert_low_precision(lambda backend, x: call(labels, backend, x), inputs, torch.float32, 1e-5)


def test_gradient_follows_the_factor_of_the_loss() -> None:
    labels, inputs = labels_of(9, 6), inputs_of(9)
    leaves = [value.requires_grad_(True) for value in inputs.values()]
    once = torch.autograd.grad(call(labels, "eager", inputs)[0], leaves)
    scaled = torch.autograd.grad(call(labels, "eager", inputs)[0] / 8, leaves)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(a / 8, b)


def test_a_second_backward_is_refused() -> None:
    inputs = {name: value.requires_grad_(True) for name, value in inputs_of(5).items()}
    (loss,) = call(labels_of(5, 5), "eager", inputs)
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        torch.autograd.backward(loss)


def test_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Tensor) -> None:
        raise AssertionError("a gradient product without need")

    monkeypatch.setattr(eager, "_add_grad_weight", unexpected)
    inputs = {name: value.requires_grad_(True) for name, value in inputs_of(5).items()}
    labels = labels_of(5, 5)
    with torch.no_grad():
        (loss,) = call(labels, "eager", inputs)
    torch.testing.assert_close(loss, call(labels, "reference", inputs)[0])


@pytest.mark.parametrize("vocab", [1, 100, 8192, 65_536, 262_272, 10**9])
def test_chunks_respect_the_memory_limit(vocab: int) -> None:
    rows = eager.chunk_rows(vocab, 4)
    assert rows == 1 or rows * vocab * 4 <= 128 * 2**20
    assert rows >= 127 or vocab > 262_272


MEASURE = REPOSITORY / "kernels" / "bench" / "loss_memory.py"


def test_memory_at_the_full_vocabulary() -> None:
    """262,272 x 8,192 whole logits would take 8 GiB; the loss may take 1 beyond its operands.

    Nearly all of what it takes is logits, so a narrow model shows it as well as a wide one.
    """
    command = [sys.executable, str(MEASURE), "--hidden", "16", "--bare"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peak, own = (int(word) for word in done.stdout.split())
    assert 0 < peak - own < 2**30
