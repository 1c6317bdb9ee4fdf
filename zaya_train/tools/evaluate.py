"""Exact match of a model's answers on rows with known answers."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from zaya_train.config.errors import DataError
from zaya_train.data.chat import final_answer
from zaya_train.runtime.files import write_json
from zaya_train.tools.generate import (
    GenerateRequest,
    Reply,
    check_request,
    decode,
    load_sampler,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """How to score.

    max_new_tokens caps every row; below the cap a row gets the length of its reference reply plus
    extra_tokens. num_samples of the scored rows are kept in the report, failures first.
    """

    max_new_tokens: int = 4096
    extra_tokens: int = 16
    batch_size: int = 256
    num_samples: int = 12
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class EvalSample:
    """One scored row."""

    id: str
    family: str
    prompt: str
    reply: str
    answer: str
    expected: str
    correct: bool
    finished: bool


@dataclass(frozen=True)
class EvalReport:
    """Result over all rows; by_family maps a family to (correct, total)."""

    total: int
    correct: int
    unfinished: int
    seconds: float
    by_family: dict[str, tuple[int, int]]
    samples: tuple[EvalSample, ...]

    @property
    def accuracy(self) -> float:
        """Correct over total; 0 for an empty report."""
        return self.correct / self.total if self.total else 0.0


def exact_match(
    model_dir: Path, rows: Sequence[Row], request: EvalRequest, progress: Progress | None = None
) -> EvalReport:
    """Greedy answers compared with `row["answer"]`, white space at the ends ignored.

    rows are those of `data.synth`: `messages` ending in the reference reply, `answer`, and
    optionally `id` and `family`. The answer is the text after the last `</think>`. To bound the
    cost, a row decodes at most its reference reply's tokens plus `extra_tokens`, rounded up to the
    largest such budget in its batch; a reply not ended by then counts as unfinished and is wrong.
    `progress` gets a bar.

    Raises DataError for rows without these fields, otherwise as `generate_answers`.
    """
    settings = GenerateRequest(
        max_new_tokens=request.max_new_tokens, batch_size=request.batch_size, device=request.device
    )
    check_request(settings)
    for number, row in enumerate(rows):
        _check_row(row, f"row {number}")
    start = time.perf_counter()
    sampler = load_sampler(model_dir, request.device)
    references = [row["messages"][-1]["content"] for row in rows]
    budgets = [
        min(request.max_new_tokens, len(ids) + request.extra_tokens)
        for ids in (sampler.tokenizer(references)["input_ids"] if references else [])
    ]
    conversations = [row["messages"][:-1] for row in rows]
    replies = decode(sampler, conversations, budgets, settings, progress)
    numbered = zip(range(len(rows)), rows, replies, strict=True)
    scored = [_score(number, row, reply) for number, row, reply in numbered]
    return _report(scored, request.num_samples, time.perf_counter() - start)


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL file written by `data.synth`; DataError names the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error.msg}") from error
        _check_row(row, f"{path}:{number}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows to evaluate")
    return rows


def write_report(report: EvalReport, path: Path) -> None:
    """Write the report as JSON, whole or not at all; StorageError when it cannot be written."""
    write_json(path, {"accuracy": report.accuracy, **asdict(report)})


def print_report(report: EvalReport, console: Console, title: str = "exact match") -> None:
    """One line per family and one for all of them."""
    table = Table(title=title)
    table.add_column("family")
    for name in ("correct", "total", "accuracy"):
        table.add_column(name, justify="right")
    families = report.by_family if len(report.by_family) > 1 else {}
    for family, (correct, total) in families.items():
        table.add_row(family, str(correct), str(total), f"{correct / total:.1%}")
    table.add_section()
    table.add_row("all", str(report.correct), str(report.total), f"{report.accuracy:.1%}")
    console.print(table)
    console.print(f"{report.unfinished} unfinished replies, {report.seconds:.1f} s", style="dim")


def _check_row(row: Any, where: str) -> None:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: `messages` must hold a prompt and a reference reply")
    if not all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in messages
    ):
        raise DataError(f"{where}: every message must be an object with a text `content`")
    if messages[-1].get("role") != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's")
    if not isinstance(row.get("answer"), str):
        raise DataError(f"{where}: `answer` must be a text")


def _score(number: int, row: Row, reply: Reply) -> EvalSample:
    answer, expected = final_answer(reply.text), row["answer"].strip()
    return EvalSample(
        id=str(row.get("id", number)),
        family=row.get("family", "all"),
        prompt=row["messages"][-2]["content"],
        reply=reply.text,
        answer=answer,
        expected=expected,
        correct=reply.finished and answer == expected,
        finished=reply.finished,
    )


def _report(scored: list[EvalSample], num_samples: int, seconds: float) -> EvalReport:
    total = Counter(sample.family for sample in scored)
    correct = Counter(sample.family for sample in scored if sample.correct)
    # sorted() is stable: failures first, each group in the order of the rows.
    shown = sorted(scored, key=lambda sample: sample.correct)[:num_samples]
    return EvalReport(
        total=len(scored),
        correct=sum(correct.values()),
        unfinished=sum(not sample.finished for sample in scored),
        seconds=seconds,
        by_family={family: (correct[family], total[family]) for family in sorted(total)},
        samples=tuple(shown),
    )
