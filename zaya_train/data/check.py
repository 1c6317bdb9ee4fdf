"""The corpora of a whole plan, looked at before anything starts.

A phase weeks into a run must not be the first to find that its corpus is not there.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from zaya_train.config.derive import sources_drawn
from zaya_train.config.errors import ConfigError, DataError
from zaya_train.data.corpus import Corpus
from zaya_train.data.tokenizer import read_template
from zaya_train.runtime.files import copy_folder_once, whole_directory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zaya_train.config.schema import TrainConfig
    from zaya_train.data.tokenizer import TemplateSource


def check_corpora(config: TrainConfig) -> dict[str, str]:
    """Open each corpus that a phase draws from and each for validation; headers and sizes only.

    Returns the content hash of each source that a phase draws from, by name.

    Raises:
        DataError: not a corpus, or damaged; or two of them, of whichever phases, were made with
            different tokenizers, so that one id would mean two things, or are conversations in
            different chat templates.
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


def keep_tokenizer(config: TrainConfig, target: Path) -> None:
    """Copy to `target` the tokenizer folder that goes with the trained model.

    All corpora have one tokenizer, but only those of conversations, which have one chat template,
    say in which the model is to be asked. A copy with another one, from before a phase of
    conversations was added to the plan, is replaced.

    Raises:
        StorageError: the file system refused.
    """
    drawn = sources_drawn(config.plan.phases.values())
    corpora = [Corpus.open(config.data.sources[name].path) for name in drawn]
    chosen = next((corpus for corpus in corpora if corpus.template), corpora[0])
    if chosen.template and target.is_dir() and _differ(read_template(target), chosen.template):
        with whole_directory(target) as folder:
            shutil.copytree(chosen.tokenizer_path, folder, dirs_exist_ok=True)
    copy_folder_once(chosen.tokenizer_path, target)


def require_same_tokenizer(corpora: Mapping[str, Corpus]) -> None:
    """DataError naming the first two corpora, by name and path, of different tokenizers or, where
    both hold conversations, of different chat templates."""
    first: tuple[str, Corpus] | None = None
    for name, corpus in corpora.items():
        first = first or (name, corpus)
        # Equal sizes say nothing: the identity is the hash of the tokenizer itself.
        if first[1].manifest.tokenizer_sha256 != corpus.manifest.tokenizer_sha256:
            raise DataError(
                f"{first[0]} ({first[1].path}) and {name} ({corpus.path}) have different "
                f"tokenizers: {_identity(first[1])} and {_identity(corpus)}"
            )
    chats = [(name, corpus) for name, corpus in corpora.items() if corpus.manifest.kind == "chat"]
    for name, corpus in chats[1:]:
        if _differ(chats[0][1].template, corpus.template):
            raise DataError(
                f"{chats[0][0]} ({chats[0][1].path}) and {name} ({corpus.path}) hold conversations "
                "in different chat templates; prepare one of them anew, with or without "
                "--own-template as the other"
            )


def _differ(one: TemplateSource | None, other: TemplateSource | None) -> bool:
    """Whether two templates, wherever they stand, render differently."""
    texts = [source and (source.text, sorted(source.variables)) for source in (one, other)]
    return texts[0] != texts[1]


def _identity(corpus: Corpus) -> str:
    manifest = corpus.manifest
    return f"{manifest.vocab_size} ids with sha256 {manifest.tokenizer_sha256[:12]}"
