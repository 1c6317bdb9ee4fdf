"""`zaya data ledger verify` and `show`: what a run really read.

Verification rebuilds the order from the run's configuration and holds the ledger against it: steps
and rows without gap or overlap, every step's fingerprint, and for every source that no part of a
document comes twice within a pass and none is missing from a finished one. A pass may span phases,
contexts, mixtures, restarts and changes of the number of ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from zaya_train.config.build import build
from zaya_train.config.errors import DataError
from zaya_train.config.schema import TrainConfig
from zaya_train.data.ledger import (
    LEDGER_FILE,
    PhaseEntry,
    StepEntry,
    add_fingerprints,
    fingerprint_text,
    read_ledger,
)
from zaya_train.data.row_plan import Pieces
from zaya_train.data.stream import PhaseStream, past_phases
from zaya_train.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from zaya_train.data.source import RowSource

_CONFIG_FILE = "config.json"


@dataclass
class _Pass:
    """What one source has read of the pass under way."""

    parts: list[Pieces] = field(default_factory=list)
    whole: bool = False
    """Whether the ledger holds its beginning."""
    opening: Pieces | None = None
    """All that the pass will read, as planned when it began."""

    def joined(self) -> Pieces:
        if not self.parts:
            return Pieces(*(np.empty(0, dtype=np.int64) for _ in Pieces._fields))
        return Pieces(*(np.concatenate(column) for column in zip(*self.parts, strict=True)))


@dataclass
class _Report:
    """What verification counts."""

    steps: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    """By source."""
    finished: Counter[str] = field(default_factory=Counter)
    """Whole passes by source."""
    passes: dict[str, _Pass] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """The steps of one phase and the stream they were drawn from."""

    entry: PhaseEntry
    steps: list[StepEntry]
    stream: PhaseStream


def verify(run_dir: Path, tokens: bool, console: Console) -> None:
    """Check a run's ledger and print what it proves.

    Args:
        run_dir: the run.
        tokens: read every row again and compare the steps' fingerprints.
        console: where to print.

    Raises:
        DataError: the first thing that is wrong, with the step.
    """
    report = _Report()
    for part in _parts(run_dir):
        _check_part(run_dir, part, tokens, report)
    for name, reading in report.passes.items():
        _check_no_repeat(run_dir, name, reading)
    console.print(_summary(report))
    compared = "fingerprints of all rows equal" if tokens else "fingerprints not compared"
    console.print(
        f"{run_dir / LEDGER_FILE}: {report.steps:,} steps, nothing twice, nothing lost; {compared}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def show(run_dir: Path, step: int, rows: int, console: Console) -> None:
    """Print the text that a step was made of.

    Raises:
        DataError: no such step, or its rows are no longer what the ledger says.
    """
    for part in _parts(run_dir):
        for entry in part.steps:
            if entry.step == step:
                _show_step(run_dir, part, entry, rows, console)
                return
    raise DataError(f"{run_dir / LEDGER_FILE}: no step {step}")


def _parts(run_dir: Path) -> list[_Part]:
    config = _config(run_dir)
    grouped: list[tuple[PhaseEntry, list[StepEntry]]] = []
    for entry in read_ledger(run_dir):
        if isinstance(entry, PhaseEntry):
            grouped.append((entry, []))
        elif not grouped:
            raise DataError(f"{run_dir / LEDGER_FILE}: step {entry.step} before any phase")
        else:
            grouped[-1][1].append(entry)
    consumed: list[int] = []
    parts = []
    names = list(config.plan.phases)
    for entry, steps in grouped:
        if entry.name not in names:
            raise DataError(f"{run_dir / LEDGER_FILE}: phase {entry.name} is not in {_CONFIG_FILE}")
        past = past_phases(config.plan.phases, consumed[: names.index(entry.name)])
        phase = config.plan.phases[entry.name]
        stream = PhaseStream(config.data, entry.name, phase, config.run.seed, past)
        parts.append(_Part(entry, steps, stream))
        consumed.append(steps[-1].first + steps[-1].rows if steps else 0)
    return parts


def _config(run_dir: Path) -> TrainConfig:
    file = run_dir / _CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return build(TrainConfig, values)


def _check_part(run_dir: Path, part: _Part, tokens: bool, report: _Report) -> None:
    path, stream = run_dir / LEDGER_FILE, part.stream
    now = stream.describe()
    for key, before in part.entry.stream.items():
        if now.get(key) != before:
            raise DataError(
                f"{path}: phase {part.entry.name}: {key} was {before}, is now {now.get(key)}"
            )
    step, first = part.entry.step, part.steps[0].first if part.steps else 0
    for entry in part.steps:
        step += 1
        if (entry.step, entry.first) != (step, first) or entry.rows < 1:
            raise DataError(
                f"{path}: step {step} should begin at row {first} of phase {part.entry.name}; the "
                f"ledger goes on with step {entry.step} at row {entry.first}"
            )
        for index in range(first, first + entry.rows):
            _take(run_dir, stream, index, report)
        if tokens:
            _compare(path, stream, entry)
        first += entry.rows
    report.steps += len(part.steps)


def _take(run_dir: Path, stream: PhaseStream, index: int, report: _Report) -> None:
    """Enter one row into the pass of its source; a pass that ends is checked."""
    name, draw = stream.locate(index)
    source = stream.sources[name]
    report.rows[name] += 1
    reading = report.passes.setdefault(name, _Pass())
    if source.begins_epoch(draw):
        _check_no_repeat(run_dir, name, reading)
        if reading.whole:
            _check_no_loss(run_dir, name, reading, source)
            report.finished[name] += 1
        reading = report.passes[name] = _Pass(whole=True, opening=source.plan.rows()[0])
    reading.parts.append(source.pieces(draw))


def _check_no_repeat(run_dir: Path, name: str, reading: _Pass) -> None:
    pieces = reading.joined()
    order = np.lexsort((pieces.starts, pieces.documents))
    documents, starts, lengths = pieces.take(order)
    # A trimmed conversation counts as a whole: its length is what was kept of it.
    overlap = (documents[1:] == documents[:-1]) & (starts[1:] < starts[:-1] + lengths[:-1])
    if overlap.any():
        bad = int(documents[1:][overlap][0])
        raise DataError(
            f"{run_dir / LEDGER_FILE}: source {name}: document {bad} comes twice in one pass"
        )


def _check_no_loss(run_dir: Path, name: str, reading: _Pass, source: RowSource) -> None:
    """All that was planned when the pass began has been read, in these or in other pieces."""
    planned, read = reading.opening, reading.joined()
    if planned is None:
        return
    if source.corpus.manifest.kind == "chat":
        missing = np.setdiff1d(planned.documents, read.documents)
        lost = len(missing)
    else:
        # Cut at another context, a last row without a target may be left out.
        lost = int(planned.lengths.sum() - read.lengths.sum())
        lost = max(0, lost - source.request.spec.row_tokens)
    if lost:
        raise DataError(
            f"{run_dir / LEDGER_FILE}: source {name}: {lost} documents or tokens of a pass were "
            "never read"
        )


def _compare(path: Path, stream: PhaseStream, entry: StepEntry) -> None:
    rows = (stream.row(index) for index in range(entry.first, entry.first + entry.rows))
    found = fingerprint_text(add_fingerprints(row.fingerprint for row in rows))
    if found != entry.fingerprint:
        raise DataError(
            f"{path}: step {entry.step}: the ranks read rows of fingerprint {entry.fingerprint}, "
            f"the order gives {found}"
        )


def _summary(report: _Report) -> Table:
    table = Table(title="realised mixture", title_justify="left")
    for name in ("source", "rows", "share", "finished passes"):
        table.add_column(name, justify="left" if name == "source" else "right")
    total = max(1, report.rows.total())
    for name, count in sorted(report.rows.items()):
        table.add_row(name, f"{count:,}", f"{count / total:.3%}", f"{report.finished[name]:,}")
    return table


def _show_step(run_dir: Path, part: _Part, entry: StepEntry, rows: int, console: Console) -> None:
    stream = part.stream
    _compare(run_dir / LEDGER_FILE, stream, entry)
    tokenizer = load_tokenizer(str(stream.tokenizer_path))
    last = entry.first + entry.rows
    console.print(
        f"step {entry.step}, phase {part.entry.name}: rows {entry.first} to {last - 1}, "
        f"fingerprint {entry.fingerprint}",
        markup=False,
    )
    for index in range(entry.first, min(last, entry.first + rows)):
        _show_row(stream, index, tokenizer, console)
    if entry.rows > rows:
        console.print(f"{entry.rows - rows} more rows; --rows shows them", markup=False)


def _show_row(stream: PhaseStream, index: int, tokenizer: Tokenizer, console: Console) -> None:
    row = stream.row(index)
    begin = 0
    for document, start, length in zip(
        row.documents.tolist(), row.starts.tolist(), row.document_lengths.tolist(), strict=True
    ):
        console.print(
            Text(f"row {index}: {row.source} document {document}, from token {start}: ", "bold")
            + Text(f"{length} tokens", "bold")
        )
        console.print(Text(tokenizer.decode(row.tokens[begin : begin + length])))
        begin += length
