"""The corpora of a whole plan, looked at before anything starts.

A phase weeks into a run must not be the first to find that its corpus is not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_train.config.derive import sources_drawn
from zaya_train.config.errors import ConfigError, DataError
from zaya_train.data.corpus import Corpus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.config.schema import TrainConfig


def check_corpora(config: TrainConfig) -> dict[str, str]:
    """Open each corpus that a phase draws from and each for validation; headers and sizes only.

    Returns the content hash of each source that a phase draws from, by name.

    Raises:
        DataError: not a corpus, or damaged; or two of them, of whichever phases, were made with
            different tokenizers, so that one id would mean two things.
        ConfigError: its token ids do not fit the model's vocabulary.
    """
    drawn = sources_drawn(config.plan.phases.values())
    rows = [(f"data.sources.{name}", config.data.sources[name]) for name in drawn]
    rows += [(f"data.validation.{name}", row) for name, row in config.data.validation.items()]
    corpora = {key: Corpus.open(row.path) for key, row in rows}
    require_same_tokenizer(corpora)
    for key, corpus in corpora.items():
        size = corpus.manifest.vocab_size
        if size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size: {config.model.vocab_size} is smaller than the {size} ids of "
                f"the tokenizer of {key} ({corpus.path})"
            )
    return {name: corpora[f"data.sources.{name}"].manifest.content_sha256 for name in drawn}


def require_same_tokenizer(corpora: Mapping[str, Corpus]) -> None:
    """DataError naming the first two corpora, by name and path, of different tokenizers."""
    first: tuple[str, Corpus] | None = None
    for name, corpus in corpora.items():
        first = first or (name, corpus)
        # Equal sizes say nothing: the identity is the hash of the tokenizer itself.
        if first[1].manifest.tokenizer_sha256 != corpus.manifest.tokenizer_sha256:
            raise DataError(
                f"{first[0]} ({first[1].path}) and {name} ({corpus.path}) have different "
                f"tokenizers: {_identity(first[1])} and {_identity(corpus)}"
            )


def _identity(corpus: Corpus) -> str:
    manifest = corpus.manifest
    return f"{manifest.vocab_size} ids with sha256 {manifest.tokenizer_sha256[:12]}"
