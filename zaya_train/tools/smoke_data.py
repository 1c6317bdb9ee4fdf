"""Corpora of the smoke run: generated problems, or a dataset the user names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from zaya_train.data.corpus import Corpus
from zaya_train.data.prepare import HELDOUT, HELDOUT_TEXT, TRAIN, PrepareRequest, prepare
from zaya_train.data.synth import SynthRequest, generate, write_jsonl
from zaya_train.runtime.files import whole_file
from zaya_train.tools.evaluate import read_rows

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from rich.console import Console

_TRAIN_PROBLEMS = 24_000
_TEXT_PROBLEMS = 4_000
_HELDOUT_PROBLEMS = 400
_HELDOUT_FRACTION = 0.05
_PHASES = ("pretrain_1", "pretrain_2", "midtrain", "sft")
_CONTEXT_RATIO = (1, 1, 8, 32)
"""The published contexts, 4K : 4K : 32K : 131K."""
_BASE_CONTEXTS = (128, 256, 512, 1024)
_STEP_TOKENS = 4096
"""Tokens of a step over two ranks, as in configs/plan/smoke.yaml."""


class DataRequest(Protocol):
    """The part of a smoke request that this file reads."""

    @property
    def data(self) -> str | None:
        """Dataset path or hub name."""
        ...

    @property
    def tokenizer(self) -> str:
        """Tokenizer spec."""
        ...


@dataclass(frozen=True)
class SmokeData:
    """Corpora on disk and how to train on them."""

    overrides: tuple[str, ...]
    tokenizer: Path
    heldout: Path | None
    """JSONL of held-out problems; None for plain text, which has no answers."""
    prompts: tuple[str, ...]


def synthetic_data(out: Path, console: Console) -> SmokeData:
    """Reasoning problems as conversations, a part of them also as plain text."""
    data = out / "data"
    write_jsonl(SynthRequest(_TRAIN_PROBLEMS, seed=0, split="train"), data / "train.jsonl")
    write_jsonl(SynthRequest(_HELDOUT_PROBLEMS, seed=0, split="heldout"), data / "heldout.jsonl")
    _write_text(data / "text.jsonl")
    for source, target in (("train", "reasoning"), ("heldout", "heldout"), ("text", "text")):
        prepare(PrepareRequest(input=str(data / f"{source}.jsonl"), output=data / target), console)
    corpus = data / "reasoning" / TRAIN
    rows = read_rows(data / "heldout.jsonl")
    return SmokeData(
        overrides=(
            f"data.sources.reasoning.path={corpus}",
            f"data.sources.text.path={data / 'text' / TRAIN}",
            f"data.validation.reasoning.path={data / 'heldout' / TRAIN}",
        ),
        tokenizer=Corpus.open(corpus).tokenizer_path,
        heldout=data / "heldout.jsonl",
        prompts=tuple(row["messages"][0]["content"] for row in rows[:3]),
    )


def _write_text(path: Path) -> None:
    """Worked problems as plain documents, the `web text` of the miniature."""
    request = SynthRequest(_TEXT_PROBLEMS, seed=1, split="train")
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in generate(request):
            prompt, reply = (message["content"] for message in row["messages"])
            worked = reply.replace("<think>", "").replace("</think>", "\n")
            file.write(json.dumps({"text": f"{prompt}\n{worked}"}) + "\n")


def given_data(out: Path, request: DataRequest, console: Console) -> SmokeData:
    """The user's dataset, with a held-out share and contexts that fit its documents."""
    folder = out / "data" / "given"
    prepare(
        PrepareRequest(
            input=str(request.data),
            output=folder,
            tokenizer=request.tokenizer,
            heldout_fraction=_HELDOUT_FRACTION,
        ),
        console,
    )
    corpus = Corpus.open(folder / TRAIN)
    heldout = folder / HELDOUT_TEXT if corpus.manifest.kind == "chat" else None
    base = _base_context(corpus.lengths)
    console.print(f"contexts {', '.join(str(base * r) for r in _CONTEXT_RATIO)} tokens")
    overrides = [
        f"model.vocab_size={corpus.manifest.vocab_size}",
        f"model.max_context_tokens={base * _CONTEXT_RATIO[-1]}",
        f"data.sources.reasoning.path={folder / TRAIN}",
        f"data.validation.reasoning.path={folder / HELDOUT}",
        "~data.sources.text",
        *_phase_overrides(base),
    ]
    return SmokeData(
        overrides=tuple(overrides),
        tokenizer=corpus.tokenizer_path,
        heldout=heldout,
        prompts=_prompts(corpus, heldout),
    )


def _base_context(lengths: NDArray[np.integer]) -> int:
    """Smallest first-phase context that holds nine tenths of the documents whole, within limits."""
    wanted = float(np.quantile(lengths, 0.9))
    return next((size for size in _BASE_CONTEXTS if size >= wanted), _BASE_CONTEXTS[-1])


def _phase_overrides(base: int) -> list[str]:
    """Every phase on the one source; a step is a row, or several where rows are short."""
    overrides = []
    for name, ratio in zip(_PHASES, _CONTEXT_RATIO, strict=True):
        key, context = f"plan.phases.{name}", base * ratio
        overrides += [
            f"{key}.context_tokens={context}",
            f"{key}.global_batch_tokens={max(_STEP_TOKENS, context)}",
            f"{key}.micro_batch_sequences={max(1, _STEP_TOKENS // 2 // context)}",
        ]
        if name != _PHASES[-1]:
            overrides.append(f"~{key}.mixture.text")
    return overrides


def _prompts(corpus: Corpus, heldout: Path | None) -> tuple[str, ...]:
    """What to ask the trained model: held-out prompts, or the beginnings of training documents."""
    if heldout is not None:
        return tuple(row["messages"][0]["content"] for row in read_rows(heldout)[:3])
    count = min(3, len(corpus))
    return tuple(corpus.tokenizer.decode(corpus.tokens(i)[:64].tolist()) for i in range(count))
