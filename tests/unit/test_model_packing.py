"""Documents packed in one row behave as if each were alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.config.schema import KernelsConfig

from ..helpers.models import REFERENCE, TINY, VARIANTS, packed, random_model, random_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.model import ZayaModel

torch.set_num_threads(1)
ROWS = {
    "two": ([[9, 14]], 23),
    "one_token": ([[1, 1, 5, 1]], 8),
    "padding": ([[4, 6], [13]], 16),
    "shorter_than_the_taps": ([[2, 3, 1, 2, 4]], 12),
    "many": ([[3, 1, 8, 2, 17], [30, 1], [5, 5, 5, 5]], 31),
}
TAPS = {
    "two_two": TINY,
    "four_four": VARIANTS["four_kv_heads"],
    "one_four": VARIANTS["one_expert"],
    "three_two": VARIANTS["three_kv_heads"],
    "identity": replace(TINY, skip_output="identity"),
}
KERNELS = {"eager": KernelsConfig(), "reference": REFERENCE}


def alone(model: ZayaModel, tokens: Tensor, lengths: list[list[int]]) -> list[Tensor]:
    """Logits of every document run by itself."""
    results = []
    for row, documents in zip(tokens, lengths, strict=True):
        results += [model.logits(part[None])[0] for part in row[: sum(documents)].split(documents)]
    return results


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("taps", TAPS)
def test_logits_are_those_of_the_documents_alone(taps: str, row: str, kernels: str) -> None:
    lengths, row_tokens = ROWS[row]
    model = random_model(TAPS[taps], kernels=KERNELS[kernels])
    tokens = random_tokens(model.config, len(lengths), row_tokens)
    with torch.no_grad():
        together = model.logits(tokens, packed(lengths, row_tokens))
        single = alone(model, tokens, lengths)
    parts = [
        part
        for logits, documents in zip(together, lengths, strict=True)
        for part in logits[: sum(documents)].split(documents)
    ]
    gaps = [float((a - b).abs().max()) for a, b in zip(parts, single, strict=True)]
    assert max(gaps) <= 1e-5


def test_gradients_are_the_sum_of_the_documents_alone() -> None:
    model = random_model(TAPS["four_four"]).double()
    lengths, row_tokens = [[5, 1, 7]], 16
    tokens = random_tokens(model.config, 1, row_tokens)
    labels = random_tokens(model.config, 1, row_tokens, seed=1)
    labels[:, 13:] = IGNORE_LABEL

    def gradients(parts: list[tuple[slice, list[list[int]], int]]) -> list[Tensor]:
        model.zero_grad()
        for where, documents, width in parts:
            layout = packed(documents, width)
            torch.autograd.backward(model(tokens[:, where], labels[:, where], layout).loss)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradients([(slice(0, 16), lengths, 16)])
    split = gradients([(slice(0, 5), [[5]], 5), (slice(5, 6), [[1]], 1), (slice(6, 13), [[7]], 7)])
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_another_document_changes_no_bit(changed: int, kernels: str) -> None:
    """Earlier, later or padding tokens: everything but their own document keeps its logits.

    One expert: with several, another document's tokens change the number of rows of an expert's
    product, and the last bit with it.
    """
    config = replace(TAPS["four_four"], num_experts=1)
    model = random_model(config, kernels=KERNELS[kernels])
    lengths, row_tokens = [[7, 6]], 16
    spans = [slice(0, 7), slice(7, 13), slice(13, 16)]
    tokens = random_tokens(config, 1, row_tokens)
    other = tokens.clone()
    other[:, spans[changed]] = (other[:, spans[changed]] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = (model.logits(t, packed(lengths, row_tokens)) for t in (tokens, other))
    for index, span in enumerate(spans):
        assert torch.equal(before[:, span], after[:, span]) == (index != changed)


def test_no_gradient_reaches_another_document() -> None:
    """The embeddings of document A's tokens, none of which B has, get no gradient from B's loss."""
    config = TAPS["four_four"]
    model = random_model(config)
    tokens = torch.arange(16)[None]
    labels = torch.full((1, 16), IGNORE_LABEL)
    labels[:, 7:13] = 50
    # The head would give every embedding a gradient: take the loss before it.
    hidden, _ = model._hidden(tokens, packed([[7, 6]], 16))
    torch.autograd.backward(hidden[:, 7:13].square().sum())
    gradient = model.embedding.grad
    assert gradient is not None
    assert not gradient[:7].any() and not gradient[13:].any()
    assert gradient[7:13].abs().sum(dim=1).min() > 0


def routed_counts(config: ModelConfig, lengths: list[list[int]], row_tokens: int) -> Tensor:
    model = random_model(config)
    tokens = random_tokens(config, len(lengths), row_tokens)
    with torch.no_grad():
        load: Tensor = model(tokens, tokens, packed(lengths, row_tokens)).load
    return load.sum(dim=1)


def test_padding_is_not_counted_as_routed() -> None:
    assert routed_counts(TINY, [[4, 6], [16]], 16).tolist() == [26.0] * TINY.num_layers
    assert routed_counts(TINY, [[1], [2]], 16).tolist() == [3.0] * TINY.num_layers
