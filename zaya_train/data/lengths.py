"""How long the documents of a phase are, for forecasts of attention's work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zaya_train.data.corpus import Corpus

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zaya_train.config.schema import DataConfig, PhaseConfig


_BLOCK_DOCUMENTS = 1 << 20
"""Of which copies are made at a time: a corpus has billions."""


def document_tokens(data: DataConfig, phase: PhaseConfig) -> float | None:
    """Length of the document that an average token of the phase's mixture stands in, trimmed to the
    context; None where a corpus is not here."""
    mixture = {name: weight for name, weight in phase.mixture.items() if weight > 0}
    if not all(Path(data.sources[name].path).is_dir() for name in mixture):
        return None
    means = []
    for name in mixture:
        lengths = Corpus.open(data.sources[name].path).lengths
        means.append(mean_over_tokens(lengths, phase.context_tokens))
    return float(np.average(means, weights=list(mixture.values())))


def mean_over_tokens(
    lengths: NDArray[np.generic], limit: int, block: int = _BLOCK_DOCUMENTS
) -> float:
    """Average over tokens of the length of their document, documents being cut at `limit`."""
    tokens = squares = 0.0
    for start in range(0, len(lengths), block):
        part = np.minimum(lengths[start : start + block], limit).astype(np.float64)
        tokens += float(part.sum())
        squares += float(part @ part)
    return squares / max(1.0, tokens)
