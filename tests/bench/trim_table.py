"""What trimming does to real and generated conversations, checked against an independent reading.

    python -m tests.bench.trim_table --data ../shared/data --generated 20000

Every conversation is trimmed at every budget. Counted as wrong: an answer that is not token for
token what it was, reasoning that is no prefix, a total above the budget, a trimmed total below it
where the cut could have fallen anywhere. The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.data.conversations import generated
from zaya_train.config.errors import DataError
from zaya_train.data.chat import encode_conversations
from zaya_train.data.fields import FieldOverrides, Fields, detect_fields, to_document
from zaya_train.data.reading import open_input
from zaya_train.data.sections import Kind, Rejected, Sample
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.data.trim import Trimmed, TrimRule, trim

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zaya_train.data.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]
BUDGETS = tuple(2**power for power in range(8, 18))
_BATCH = 256


@dataclass
class Tally:
    """Outcomes of one set at one budget."""

    rules: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSONL files")
    parser.add_argument("--generated", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="bytes")
    options = parser.parse_args()
    tokenizer, console = load_tokenizer(options.tokenizer), Console(width=120)
    sets: dict[str, Iterator[Conversation]] = {}
    for file in sorted(options.data.glob("*.jsonl")):
        rows = _conversations(file)
        if rows is not None:
            sets[file.stem] = rows
    sets[f"generated {options.generated:,}"] = iter(generated(options.generated, options.seed))
    return int(sum([_judge_set(name, rows, tokenizer, console) for name, rows in sets.items()]) > 0)


def _conversations(file: Path) -> Iterator[Conversation] | None:
    """The conversations of a file, GSM8K's worked steps as reasoning; None for plain text."""
    source = open_input(str(file))
    place, first = next(source.rows())
    fields = detect_fields(first, FieldOverrides(), place)
    if fields.kind == "text":
        return None
    if fields.layout == "pair" and "\n#### " in str(first[fields.names[1]]):
        fields = Fields(layout="pair", names=fields.names, answer_marker="####")
    return _rows(file, fields)


def _rows(file: Path, fields: Fields) -> Iterator[Conversation]:
    for place, row in open_input(str(file)).rows():
        try:
            yield list(to_document(row, fields, place).messages)
        except DataError as error:
            yield [{"role": "user", "content": str(error)}]


def _judge_set(
    name: str, rows: Iterator[Conversation], tokenizer: Tokenizer, console: Console
) -> int:
    tallies = {budget: Tally() for budget in BUDGETS}
    malformed: Counter[str] = Counter()
    documents = 0
    for batch in _batched(rows):
        for sample in encode_conversations(tokenizer, batch):
            documents += 1
            if isinstance(sample, Rejected):
                malformed[sample.reason] += 1
                continue
            for budget, tally in tallies.items():
                _judge(sample, budget, tally)
    _show(name, documents, malformed, tallies, console)
    return sum(tally.wrong.total() for tally in tallies.values())


def _batched(rows: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def _judge(sample: Sample, budget: int, tally: Tally) -> None:
    kept = trim(sample, budget)
    tally.rules[str(kept.rule) if isinstance(kept, Trimmed) else "rejected"] += 1
    if not isinstance(kept, Trimmed):
        return
    mask = np.zeros(len(sample.tokens), dtype=bool)
    for start, end in kept.keep:
        mask[start:end] = True
    reasoning = sample.sections[sample.sections["kind"] == Kind.REASONING]
    if int(mask.sum()) > budget:
        tally.wrong["over budget"] += 1
    for row in sample.sections:
        part = mask[row["start"] : row["end"]]
        if row["kind"] in (Kind.ANSWER, Kind.PROMPT) and not part.all():
            tally.wrong["answer or prompt touched"] += 1
        if row["kind"] == Kind.REASONING and (np.diff(part.astype(int)) > 0).any():
            tally.wrong["reasoning is no prefix"] += 1
    short = budget - int(mask.sum())
    last = reasoning[-1] if len(reasoning) else None
    if last is None or not short or not mask[last["start"] - 1] or kept.rule == TrimRule.WHOLE:
        return
    part = mask[last["start"] : last["end"]]
    if not part.all():
        first = int(last["start"]) + int(np.argmin(part))
        if sample.continues is None or not sample.continues[sample.tokens[first + short]]:
            tally.wrong["budget not used up"] += 1


def _show(
    name: str,
    documents: int,
    malformed: Counter[str],
    tallies: dict[int, Tally],
    console: Console,
) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(malformed.items()))
    table = Table(
        title=f"{name}: {documents:,} rows; malformed: {reasons or 'none'}", title_justify="left"
    )
    names = [*(str(rule) for rule in TrimRule), "rejected"]
    for column in ("budget", *names, "wrong"):
        table.add_column(column, justify="right")
    for budget, tally in tallies.items():
        wrong = json.dumps(dict(tally.wrong)) if tally.wrong else "0"
        table.add_row(f"{budget:,}", *(f"{tally.rules[rule]:,}" for rule in names), wrong)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
