"""The corpora of a whole plan, looked at before anything starts.

A phase weeks into a run must not be the first to find that its corpus is not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_train.config.errors import ConfigError
from zaya_train.data.corpus import Corpus

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig


def check_corpora(config: TrainConfig) -> None:
    """Open each corpus that a phase draws from and each for validation; headers and sizes only.

    Raises:
        DataError: not a corpus, or damaged.
        ConfigError: its token ids do not fit the model's vocabulary.
    """
    drawn = {
        name
        for phase in config.plan.phases.values()
        for name, weight in phase.mixture.items()
        if weight > 0
    }
    rows = [(f"data.sources.{name}", config.data.sources[name]) for name in sorted(drawn)]
    rows += [(f"data.validation.{name}", row) for name, row in config.data.validation.items()]
    for key, row in rows:
        size = Corpus.open(row.path).manifest.vocab_size
        if size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size: {config.model.vocab_size} is smaller than the {size} ids of "
                f"the tokenizer of {key} ({row.path})"
            )
