"""Packed rows of random tokens, for checks that need shapes and no corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zaya_train.config.labels import IGNORE_LABEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNSUPERVISED = 0.2
"""Share of the labels that random rows leave out, so that weights by label show."""


@dataclass(frozen=True)
class RandomRow:
    """A `train.batch.PackedRow` that no corpus holds: there is no ledger of it."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    document_lengths: NDArray[np.int32]
    fingerprint: int = 0


def random_row(
    seed: int,
    documents: tuple[int, ...],
    row_tokens: int,
    vocabulary: int,
    unsupervised: float = UNSUPERVISED,
) -> RandomRow:
    """[row_tokens] tokens; labels within documents, a share of them unsupervised, none behind."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, vocabulary, row_tokens)
    labels = np.full(row_tokens, IGNORE_LABEL, dtype=np.int64)
    start = 0
    for length in documents:
        labels[start : start + length - 1] = tokens[start + 1 : start + length]
        start += length
    labels[generator.random(row_tokens) < unsupervised] = IGNORE_LABEL
    return RandomRow(tokens, labels, np.array(documents, dtype=np.int32))
