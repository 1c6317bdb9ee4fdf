"""Small documents and corpora for the data tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zaya_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from zaya_train.data.chat import encode_conversations, encode_texts
from zaya_train.data.corpus import Corpus
from zaya_train.data.corpus_writer import fill_corpus, make_block
from zaya_train.data.sections import Kind, Role, Sample, make_sections

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from zaya_train.data.tokenizer import Tokenizer

Messages = list[dict[str, Any]]


def problem(reasoning: str, answer: str = "4", prompt: str = "2+2?") -> Messages:
    """One question with reasoning and an answer."""
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": f"<think>{reasoning}</think>{answer}"},
    ]


def problems(count: int, longest: int = 300, seed: int = 0) -> list[Messages]:
    """Problems whose reasoning varies from empty to `longest` characters."""
    rng = random.Random(seed)
    return [
        problem("r" * rng.randint(0, longest), answer=str(i), prompt=f"question {i}?")
        for i in range(count)
    ]


def sample_of(turns: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> Sample:
    """A conversation of (prompt tokens, ((reasoning, answer tokens), ...)) per exchange.

    A reasoning of -1 stands for no think block. Token values are their positions, so that what is
    kept can be traced.
    """
    rows: list[tuple[int, Role, Kind, int, bool]] = []
    for number, (prompt, blocks) in enumerate(turns):
        turn = 2 * number
        rows += [(1, Role.USER, Kind.MARKUP, turn, False)]
        rows += [(prompt, Role.USER, Kind.PROMPT, turn, False)]
        rows += [(1, Role.USER, Kind.MARKUP, turn, False)]
        rows += [(1, Role.ASSISTANT, Kind.MARKUP, turn + 1, False)]
        for reasoning, answer in blocks:
            if reasoning >= 0:
                rows += [(1, Role.ASSISTANT, Kind.MARKUP, turn + 1, True)]
                rows += [(reasoning, Role.ASSISTANT, Kind.REASONING, turn + 1, True)]
                rows += [(1, Role.ASSISTANT, Kind.MARKUP, turn + 1, True)]
            rows += [(answer, Role.ASSISTANT, Kind.ANSWER, turn + 1, True)]
        rows += [(1, Role.ASSISTANT, Kind.MARKUP, turn + 1, True)]
    sections = make_sections(rows)
    return Sample(np.arange(int(sections["end"][-1])), sections)


@dataclass(frozen=True)
class CorpusFactory:
    """Writes corpora below a directory."""

    root: Path
    tokenizer: Tokenizer

    def chat(self, name: str, conversations: Sequence[Messages]) -> Path:
        path = self.root / name
        with fill_corpus(path, self.tokenizer, "chat", {"name": name}) as writer:
            writer.append(
                make_block(encode_conversations(self.tokenizer, conversations), self.tokenizer)
            )
        return path

    def text(self, name: str, texts: Sequence[str]) -> Path:
        path = self.root / name
        with fill_corpus(path, self.tokenizer, "text", {"name": name}) as writer:
            writer.append(make_block(encode_texts(self.tokenizer, texts), self.tokenizer))
        return path

    def open_chat(self, name: str, conversations: Sequence[Messages]) -> Corpus:
        return Corpus.open(self.chat(name, conversations))


def data_config(
    sources: Mapping[str, Path], validation: Mapping[str, Path] | None = None, **settings: Any
) -> DataConfig:
    return DataConfig(
        sources={name: SourceConfig(path=str(path)) for name, path in sources.items()},
        validation={
            name: SourceConfig(path=str(path)) for name, path in (validation or {}).items()
        },
        **settings,
    )


def phase_config(context_tokens: int, mixture: Mapping[str, float]) -> PhaseConfig:
    return PhaseConfig(
        tokens=1000 * context_tokens,
        context_tokens=context_tokens,
        rope_base=10_000.0,
        global_batch_tokens=context_tokens,
        mixture=dict(mixture),
    )
