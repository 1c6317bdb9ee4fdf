"""How long the documents of a phase are, for forecasts of attention's work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zaya_train.data.corpus import Corpus

if TYPE_CHECKING:
    from zaya_train.config.schema import DataConfig, PhaseConfig


def document_tokens(data: DataConfig, phase: PhaseConfig) -> float | None:
    """Length of the document that an average token of the phase's mixture stands in, trimmed to the
    context; None where a corpus is not here."""
    mixture = {name: weight for name, weight in phase.mixture.items() if weight > 0}
    if not all(Path(data.sources[name].path).is_dir() for name in mixture):
        return None
    means = []
    for name in mixture:
        lengths = np.minimum(Corpus.open(data.sources[name].path).lengths, phase.context_tokens)
        means.append(float(np.square(lengths.astype(np.float64)).sum() / max(1, lengths.sum())))
    return float(np.average(means, weights=list(mixture.values())))
