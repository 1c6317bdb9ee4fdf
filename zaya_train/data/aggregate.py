"""Aggregation examples: a problem and the tails of several attempts -> one improved solution.

They teach what Markovian recursive self-aggregation asks of a model at inference: read the last
tau tokens of C candidates and write a better answer (2605.05365: C = 4 tails of tau = 4K). Input
rows hold `prompt`, `rollouts` (texts of earlier attempts) and `solution` (the improved one, with
its own reasoning). Output rows are ordinary conversations, so `zaya data prepare`, trimming and
packing treat them like any other: the tails are prompt and are never cut.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import DataError
from zaya_train.data.chat import is_unicode, split_reasoning
from zaya_train.data.reading import open_input
from zaya_train.data.sections import Rejected, RejectReason
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.runtime.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from zaya_train.data.tokenizer import Tokenizer

INSTRUCTION = (
    "Below are a problem and the ends of several attempts to solve it. Some may be wrong. Compare "
    "them, keep what holds, and give one better solution."
)


@dataclass(frozen=True, kw_only=True)
class AggregateRequest:
    """One file of rollouts."""

    input: str
    output: Path
    candidates: int = 4
    """C: tails in an example."""
    tail_tokens: int = 4096
    """tau: tokens of a tail."""
    tokenizer: str = "bytes"
    seed: int = 0
    """Chooses C of the rollouts, and their order, by row."""


def aggregate(request: AggregateRequest) -> dict[str, int]:
    """Write an example per row; returns rows by outcome, `kept` or a reason code.

    Raises:
        DataError: input that breaks its format, settings below 1, no row that can be used.
        StorageError: the file system refused.
    """
    for name, value in (("candidates", request.candidates), ("tail", request.tail_tokens)):
        if value < 1:
            raise DataError(f"{name}: {value}, at least 1 expected")
    tokenizer = load_tokenizer(request.tokenizer)
    outcomes: Counter[str] = Counter()
    with whole_file(request.output) as partial:
        with partial.open("w", encoding="utf-8") as file:
            for place, row in open_input(request.input).rows():
                made = make_example(tokenizer, row, request, place)
                outcomes["kept" if isinstance(made, dict) else str(made.reason)] += 1
                if isinstance(made, dict):
                    file.write(json.dumps(made, ensure_ascii=False) + "\n")
        if not outcomes["kept"]:
            raise DataError(f"{request.input}: no row makes an example: {dict(outcomes)}")
    return dict(outcomes)


def make_example(
    tokenizer: Tokenizer, row: Mapping[str, Any], request: AggregateRequest, place: str
) -> dict[str, Any] | Rejected:
    """One conversation: the problem with the tails of C rollouts, then the improved solution."""
    prompt, rollouts, solution = (row.get(key) for key in ("prompt", "rollouts", "solution"))
    if not isinstance(prompt, str) or not isinstance(solution, str):
        return Rejected(RejectReason.BAD_ROW, f"{place}: prompt and solution must be text")
    if not isinstance(rollouts, list) or not all(isinstance(text, str) for text in rollouts):
        return Rejected(RejectReason.BAD_ROW, f"{place}: rollouts must be a list of texts")
    name = str(row.get("id", place.rpartition("/")[2]))
    if not all(map(is_unicode, (name, prompt, solution, *rollouts))):
        return Rejected(RejectReason.NOT_UNICODE, place)
    if len(rollouts) < request.candidates:
        found = f"{place}: {len(rollouts)} rollouts, {request.candidates} wanted"
        return Rejected(RejectReason.TOO_FEW_ROLLOUTS, found)
    parts = split_reasoning(solution)
    if isinstance(parts, RejectReason):
        return Rejected(parts, place)
    chosen = random.Random(f"{request.seed}\x1f{name}").sample(rollouts, request.candidates)
    tails = [tail(tokenizer, text, request.tail_tokens) for text in chosen]
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": _question(prompt, tails)},
            {"role": "assistant", "content": solution},
        ],
    }


def tail(tokenizer: Tokenizer, text: str, most_tokens: int) -> str:
    """The end of a text that is tokenised to no more than `most_tokens`, in whole characters."""
    offsets = tokenizer.character_offsets(text)
    total = len(offsets) - 1
    for first in range(max(0, total - most_tokens), total + 1):
        start = offsets[first]
        # Text cut before a token may be tokenised otherwise; one token less then.
        whole_character = first == 0 or offsets[first - 1] != start
        if whole_character and len(tokenizer.encode(text[start:])) <= most_tokens:
            return text[start:]
    return ""


def _question(prompt: str, tails: Sequence[str]) -> str:
    parts = [INSTRUCTION, f"Problem:\n{prompt}"]
    parts += [f"Attempt {number}, its end:\n{text}" for number, text in enumerate(tails, start=1)]
    return "\n\n".join(parts)
