"""`zaya data inspect`: what a corpus holds, and one document with its sections in colour."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from zaya_train.config.errors import DataError
from zaya_train.data.corpus import Corpus, Verify
from zaya_train.data.sections import Kind, Rejected, Role
from zaya_train.data.trim import Trimmed, trim

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from rich.console import Console

    from zaya_train.data.tokenizer import Tokenizer

STYLES = {
    Kind.TEXT: "white",
    Kind.PROMPT: "cyan",
    Kind.REASONING: "yellow",
    Kind.ANSWER: "green",
    Kind.MARKUP: "magenta",
}
REMOVED_STYLE = "red strike"
_BAR_CHARACTERS = 40


def inspect_corpus(
    path: str | Path,
    index: int,
    budget: int | None,
    console: Console,
    verify: Verify = "tokens",
) -> None:
    """Print a summary, a length histogram, and document `index`.

    Args:
        path: corpus directory.
        index: document to show, from 0.
        budget: tokens; what trimming to it would remove is struck out. None shows all.
        console: where to print.
        verify: what to check first, as `Corpus.open` does; `hashes` reads every byte.

    Raises:
        DataError: no readable corpus, no such document, a budget below one token.
    """
    if budget is not None and budget < 1:
        raise DataError(f"budget: {budget} tokens, at least 1 expected")
    corpus = Corpus.open(path, verify)
    if not 0 <= index < len(corpus):
        raise DataError(f"{path}: document {index} of {len(corpus)}: counted from 0")
    console.print(_summary(corpus))
    console.print(
        length_histogram(_powers(corpus.lengths), "document lengths (tokens)", "documents")
    )
    console.print(_document_table(corpus, index))
    kept = trim(corpus.sample(index), budget) if budget else None
    if budget:
        console.print(Text(_outcome(kept, int(corpus.lengths[index]), budget)))
    # A line broken at the terminal's edge would pass for one of the document.
    console.print(_document_text(corpus, index, kept), soft_wrap=True)
    legend = [Text(f" {kind.name.lower()} ", style) for kind, style in STYLES.items()]
    console.print(Text.assemble(*legend, Text(" removed ", REMOVED_STYLE)))


def _summary(corpus: Corpus) -> Table:
    manifest = corpus.manifest
    table = Table(title=Text(str(corpus.path)), show_header=False)
    supervised = manifest.supervised_tokens
    rows = {
        "kind": manifest.kind,
        "documents": f"{manifest.documents:,}",
        "tokens": f"{manifest.tokens:,}",
        "supervised": f"{supervised:,} ({supervised / manifest.tokens:.1%})",
        "tokenizer": f"{manifest.tokenizer_spec}, {manifest.vocab_size:,} ids",
        "tokenizer sha256": manifest.tokenizer_sha256,
        "content sha256": manifest.content_sha256,
        "rejected": ", ".join(f"{k} {v}" for k, v in manifest.rejects.items()) or "none",
        "source": ", ".join(f"{k}={v}" for k, v in manifest.source.items()),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def power_of_two(length: int) -> int:
    """The power of two a length of at least 1 falls into: 1 -> 0, 2 and 3 -> 1, ..."""
    return length.bit_length() - 1


def length_histogram(counts: Mapping[int, int], title: str, counted: str) -> Table:
    """A table with a bar per power of two; `counts` by power (see power_of_two)."""
    table = Table(title=title, title_justify="left")
    for name in ("from", "to"):
        table.add_column(name, justify="right")
    table.add_column(counted, justify="right")
    table.add_column("")
    for power in range(min(counts), max(counts) + 1):
        count = counts.get(power, 0)
        bar = "#" * round(_BAR_CHARACTERS * count / max(counts.values()))
        table.add_row(f"{2**power:,}", f"{2 ** (power + 1) - 1:,}", f"{count:,}", bar)
    return table


def _powers(lengths: NDArray[np.int64]) -> dict[int, int]:
    values, counts = np.unique(np.frexp(lengths)[1] - 1, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _document_table(corpus: Corpus, index: int) -> Table:
    table = Table(title=f"document {index}: {int(corpus.lengths[index]):,} tokens")
    for name in ("turn", "role", "section", "tokens", "supervised"):
        table.add_column(name)
    for section in corpus.sections(index):
        table.add_row(
            str(section["turn"]),
            Role(section["role"]).name.lower(),
            Text(Kind(section["kind"]).name.lower(), STYLES[Kind(section["kind"])]),
            f"{int(section['end']) - int(section['start']):,}",
            "yes" if section["supervised"] else "",
        )
    return table


def _outcome(kept: Trimmed | Rejected | None, length: int, budget: int) -> str:
    if isinstance(kept, Trimmed):
        return (
            f"budget {budget:,}: {kept.rule}, {kept.length:,} of {length:,} tokens kept, "
            f"{kept.removed_tokens:,} removed"
        )
    return f"budget {budget:,}: rejected, {kept.reason} ({kept.detail})" if kept else ""


def _document_text(corpus: Corpus, index: int, kept: Trimmed | Rejected | None) -> Text:
    """The document with one style per section; what `kept` leaves out is struck out."""
    tokenizer, tokens = corpus.tokenizer, corpus.tokens(index)
    removed = np.zeros(len(tokens), dtype=bool)
    if kept is not None:
        removed[:] = True
        for start, end in kept.keep if isinstance(kept, Trimmed) else ():
            removed[start:end] = False
    text = Text()
    for section in corpus.sections(index):
        start, end = int(section["start"]), int(section["end"])
        for run_start, run_end in _runs(removed, start, end):
            style = REMOVED_STYLE if removed[run_start] else STYLES[Kind(section["kind"])]
            text.append(_decode(tokenizer, tokens[run_start:run_end]), style)
    return text


def _runs(mask: NDArray[np.bool_], start: int, end: int) -> list[tuple[int, int]]:
    """Stretches of [start, end) over which the mask does not change."""
    if start == end:
        return []
    changes = np.flatnonzero(np.diff(mask[start:end].astype(np.int8))) + start + 1
    edges = [start, *changes.tolist(), end]
    return list(itertools.pairwise(edges))


def _decode(tokenizer: Tokenizer, tokens: NDArray[np.integer]) -> str:
    return tokenizer.decode(tokens.tolist())
