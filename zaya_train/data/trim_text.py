"""`zaya data trim`: conversations in, conversations that fit a budget out, as text with receipts.

    <output>                 one row per kept conversation: id, messages and `trim`, its receipt
    <output>.rejected.jsonl  one line per conversation left out: id, place, reason, detail

A cut is made in token ids and written as the original text up to there. It moves back by a token
where the shorter text would be tokenised differently, so what is read back is a prefix in ids too.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from zaya_train.config.errors import DataError
from zaya_train.data.chat import ROLE_MARKERS, encode_segments, json_line, parse_conversation
from zaya_train.data.fields import FieldOverrides, detect_fields, to_document
from zaya_train.data.inspect import length_histogram, power_of_two
from zaya_train.data.reading import open_input
from zaya_train.data.sections import Kind, Rejected, RejectReason, Role, Sample
from zaya_train.data.tokenizer import END, load_tokenizer
from zaya_train.data.trim import Trimmed, TrimRule, trim
from zaya_train.runtime.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from zaya_train.data.fields import Document, Fields
    from zaya_train.data.reading import Input
    from zaya_train.data.segments import Segment
    from zaya_train.data.tokenizer import Tokenizer

_BATCH_ROWS = 64
_NOT_CONTENT = {*ROLE_MARKERS.values(), END}
"""Markers of the format itself, which are no part of a message's content."""
_LABELS = {
    TrimRule.WHOLE: "kept whole",
    TrimRule.TAIL_CUT: "trimmed",
    TrimRule.EARLIER_DROPPED: "earlier reasoning dropped",
    "rejected": "rejected",
}
REJECTED_SUFFIX = ".rejected.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrimRequest:
    """One file to trim."""

    input: str
    """Conversations or pairs: a file, a folder or a hub dataset, as for `prepare`."""
    output: Path
    budget_tokens: int
    """Tokens of a whole conversation: role, think and end markers included."""
    tokenizer: str = "bytes"
    fields: FieldOverrides = field(default_factory=FieldOverrides)
    split: str = "train"
    overwrite: bool = False
    """Replace outputs that are there; never the input."""


@dataclass
class TrimSummary:
    """Counts over all rows of a request."""

    budget_tokens: int
    outcomes: Counter[str] = field(default_factory=Counter)
    """Rows by rule, or by `rejected`."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected rows by reason code."""
    before: Counter[int] = field(default_factory=Counter)
    """Rows by power of two of their tokens; so are `after`, of rows kept, and `removed`, of rows
    trimmed."""
    after: Counter[int] = field(default_factory=Counter)
    removed: Counter[int] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Rows read."""
        return sum(self.outcomes.values())


@dataclass(frozen=True)
class TrimmedText:
    """A conversation as it is written out."""

    messages: list[dict[str, str]]
    receipt: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One row's fate; `tokens_before` is 0 where the row has no usable form."""

    tokens_before: int
    left: TrimmedText | Rejected


LocatedDocument = tuple[str, "Document | Rejected"]
"""(place such as `file:line`, conversation or why the row holds none)."""


def trim_file(request: TrimRequest) -> TrimSummary:
    """Trim every row; both outputs appear when all rows are done.

    Raises:
        DataError: input that breaks its format, plain text, a budget below 1, an unknown tokenizer,
            an output that is there or is the input, not one row that fits; nothing is written.
        StorageError: the file system refused.
    """
    if request.budget_tokens < 1:
        raise DataError(f"budget: {request.budget_tokens} tokens, at least 1 expected")
    rejected = request.output.with_name(request.output.name + REJECTED_SUFFIX)
    for path in (request.output, rejected):
        _check_output(request, path)
    tokenizer = load_tokenizer(request.tokenizer)
    source = open_input(request.input, request.split)
    summary = TrimSummary(request.budget_tokens)
    with ExitStack() as stack:
        kept_file, rejected_file = (
            stack.enter_context(stack.enter_context(whole_file(path)).open("w", encoding="utf-8"))
            for path in (request.output, rejected)
        )
        for batch in _batches(source, request.fields):
            outcomes = trim_conversations(tokenizer, [d for _, d in batch], request.budget_tokens)
            for (place, document), outcome in zip(batch, outcomes, strict=True):
                _count(summary, outcome)
                row: dict[str, Any] = {}
                if not isinstance(document, Rejected):
                    row["id"] = document.id
                left = outcome.left
                if isinstance(left, Rejected):
                    row |= {"place": place, "reason": left.reason, "detail": left.detail}
                    rejected_file.write(json_line(row) + "\n")
                else:
                    row |= {"messages": left.messages, "trim": left.receipt}
                    kept_file.write(json_line(row) + "\n")
        if not summary.rows:
            raise DataError(f"{request.input}: no rows")
        if summary.outcomes["rejected"] == summary.rows:
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in summary.reasons.most_common(3))
            raise DataError(
                f"{request.input}: all {summary.rows:,} rows are rejected at a budget of "
                f"{request.budget_tokens} tokens ({reasons})"
            )
    return summary


def _check_output(request: TrimRequest, path: Path) -> None:
    if not path.exists():
        return
    if Path(request.input).exists() and path.samefile(request.input):
        raise DataError(f"{path}: is the input; trimming never replaces its source")
    if not request.overwrite:
        raise DataError(f"{path}: exists; --overwrite replaces it")


def trim_conversations(
    tokenizer: Tokenizer, documents: Sequence[Document | Rejected], budget: int
) -> list[Outcome]:
    """What is left of every conversation, in order."""
    parsed = [
        document if isinstance(document, Rejected) else parse_conversation(document.messages)
        for document in documents
    ]
    outcomes: list[Outcome] = []
    for segments, sample in zip(parsed, encode_segments(tokenizer, parsed), strict=True):
        if isinstance(sample, Rejected):
            outcomes.append(Outcome(0, sample))
        elif not isinstance(segments, Rejected):
            kept = trim(sample, budget)
            left = (
                kept
                if isinstance(kept, Rejected)
                else _Writer(tokenizer, segments, sample).write(kept)
            )
            outcomes.append(Outcome(len(sample.tokens), left))
    return outcomes


@dataclass(frozen=True)
class _Writer:
    """Turns what `trim` kept of one conversation back into messages."""

    tokenizer: Tokenizer
    segments: Sequence[Segment]
    sample: Sample

    def write(self, kept: Trimmed) -> TrimmedText:
        contents: dict[int, str] = {}
        roles: dict[int, Role] = {}
        removed: list[dict[str, int]] = []
        for segment, row in zip(self.segments, self.sample.sections, strict=True):
            start, end = int(row["start"]), int(row["end"])
            stop = _kept_until(kept, start, end)
            text, stop = self._text(segment, start, end, stop)
            if segment.text not in _NOT_CONTENT or segment.kind != Kind.MARKUP:
                contents[segment.turn] = contents.get(segment.turn, "") + text
            roles[segment.turn] = segment.role
            if stop < end:
                removed.append({"turn": segment.turn, "start": stop, "end": end})
        messages = [
            {"role": roles[turn].name.lower(), "content": content}
            for turn, content in contents.items()
        ]
        total = len(self.sample.tokens)
        taken = sum(part["end"] - part["start"] for part in removed)
        receipt = {
            "rule": str(kept.rule),
            "tokens": total - taken,
            "tokens_before": total,
            "removed_tokens": taken,
            "removed": _joined(removed),
        }
        return TrimmedText(messages, receipt)

    def _text(self, segment: Segment, start: int, end: int, stop: int) -> tuple[str, int]:
        """The text of a segment's tokens [start, stop), and where it really stops."""
        if stop == end:
            return segment.text, end
        ids = self.sample.tokens[start:end].tolist()
        offsets = self.tokenizer.character_offsets(segment.text)
        for count in range(stop - start, 0, -1):
            text = segment.text[: offsets[count]]
            if self.tokenizer.encode(text) == ids[:count]:
                return text, start + count
        return "", start


def _kept_until(kept: Trimmed, start: int, end: int) -> int:
    """Where the kept part of [start, end) ends; `trim` removes tails and whole sections only."""
    if start == end:
        return end
    holding = [stop for first, stop in kept.keep if first <= start < stop]
    return min(holding[0], end) if holding else start


def _joined(parts: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """Adjacent removed ranges of one turn as one."""
    joined: list[dict[str, int]] = []
    for part in parts:
        if joined and joined[-1]["end"] == part["start"] and joined[-1]["turn"] == part["turn"]:
            joined[-1]["end"] = part["end"]
        else:
            joined.append(dict(part))
    return joined


def _batches(source: Input, overrides: FieldOverrides) -> Iterator[list[LocatedDocument]]:
    """Conversations with their places, a few at a time; a row without one comes as its reject."""
    fields: Fields | None = None
    batch: list[LocatedDocument] = []
    for place, row in source.rows():
        if fields is None:
            fields = detect_fields(row, overrides, place)
            if fields.kind == "text":
                raise DataError(f"{place}: plain text has no reasoning to trim")
        try:
            batch.append((place, to_document(row, fields, place)))
        except DataError as error:
            reason = str(error).removeprefix(f"{place}: ")
            batch.append((place, Rejected(RejectReason.BAD_ROW, reason)))
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _count(summary: TrimSummary, outcome: Outcome) -> None:
    if outcome.tokens_before:
        summary.before[power_of_two(outcome.tokens_before)] += 1
    if isinstance(outcome.left, Rejected):
        summary.outcomes["rejected"] += 1
        summary.reasons[outcome.left.reason] += 1
        return
    receipt = outcome.left.receipt
    summary.outcomes[receipt["rule"]] += 1
    summary.after[power_of_two(receipt["tokens"])] += 1
    if receipt["removed_tokens"]:
        summary.removed[power_of_two(receipt["removed_tokens"])] += 1


def show_summary(summary: TrimSummary, console: Console) -> None:
    """Print the table of outcomes, the reasons of rejects and the three histograms."""
    table = Table(title=f"trimmed to {summary.budget_tokens:,} tokens", title_justify="left")
    table.add_column("outcome")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for rule, label in _LABELS.items():
        count = summary.outcomes[rule]
        table.add_row(label, f"{count:,}", f"{count / summary.rows:.2%}")
    for reason, count in sorted(summary.reasons.items()):
        table.add_row(f"  {reason}", f"{count:,}", f"{count / summary.rows:.2%}")
    console.print(table)
    for title, counts in (
        ("tokens before", summary.before),
        ("tokens after", summary.after),
        ("tokens removed, of trimmed rows", summary.removed),
    ):
        if counts:
            console.print(length_histogram(counts, title, "rows"))
