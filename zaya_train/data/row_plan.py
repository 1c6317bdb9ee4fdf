"""Plans: which part of which document stands in which row of one source at one context length.

Conversations are trimmed and packed whole, best fit first; plain text is laid end to end and cut.
Both give the same thing, a list of pieces per row, made once over the whole corpus. Boundaries come
from it and never from a token.

Rows stand in the order of their attention work (sum of squared piece lengths), so that neighbours
cost the same: see `order.balanced_row`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from zaya_train.data.packing import pack_best_fit
from zaya_train.data.trim import TrimRule
from zaya_train.data.trim_table import REJECTED, RULES, UNSUPERVISED, trim_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from zaya_train.data.corpus import Corpus

PLAN_VERSION = 5
COUNTS = {
    **{str(rule): code for code, rule in enumerate(RULES)},
    "rejected": REJECTED,
    "unsupervised": UNSUPERVISED,
}
"""Names of a trim table's outcomes."""


class Pieces(NamedTuple):
    """Parts of documents; three arrays of one length."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    """First token, from the document's start; 0 for conversations."""
    lengths: NDArray[np.int64]
    """Tokens; for conversations those that trimming keeps."""

    def take(self, places: NDArray[np.int64]) -> Pieces:
        """Some of the pieces, in the order of `places`."""
        return Pieces(self.documents[places], self.starts[places], self.lengths[places])


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Row r holds pieces[offsets[r]:offsets[r + 1]], in that order."""

    pieces: Pieces
    offsets: NDArray[np.int64]
    supervised: NDArray[np.int64]
    """[rows] targets."""
    work: NDArray[np.int64]
    """[rows] sum of squared piece lengths, which rises from row to row."""
    facts: Mapping[str, int]
    """Documents by outcome (COUNTS), `tokens` and `supervised_tokens` placed, `removed_tokens` of
    documents placed and `dropped_tokens` of documents left out."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """What a plan follows from, besides the corpus."""

    row_tokens: int
    max_documents: int
    loss_on: str = "assistant"
    balance_rows: int = 1
    """Rows whose work is made equal as far as the documents allow; see packing."""


def plan_documents(
    corpus: Corpus, spec: PlanSpec, chosen: NDArray[np.int64] | None = None
) -> RowPlan:
    """Plan of conversations: all, or the `chosen` ones."""
    table = trim_all(corpus, spec.row_tokens, spec.loss_on)
    kept = np.flatnonzero(table.outcomes < len(RULES))
    total = len(corpus)
    left_out = corpus.manifest.tokens
    if chosen is not None:
        mask = np.zeros(total, dtype=bool)
        mask[chosen] = True
        kept, left_out = kept[mask[kept]], int(corpus.lengths[chosen].sum())
        table.outcomes[~mask] = UNSUPERVISED + 1
    packed = pack_best_fit(
        kept, table.lengths[kept], spec.row_tokens, spec.max_documents, spec.balance_rows
    )
    documents = packed.documents
    pieces = Pieces(documents, np.zeros_like(documents), table.lengths[documents])
    original = int(corpus.lengths[kept].sum())
    placed = int(pieces.lengths.sum())
    facts = {name: table.count(code) for name, code in COUNTS.items()}
    facts |= {
        "tokens": placed,
        "removed_tokens": original - placed,
        "dropped_tokens": left_out - original,
    }
    supervised = _sums(table.supervised[documents], packed.offsets)
    return _by_work(pieces, packed.offsets, supervised, facts)


def plan_text(pieces: Pieces, document_lengths: NDArray[np.int64], row_tokens: int) -> RowPlan:
    """Plan of text: `pieces` end to end, cut every `row_tokens`.

    `document_lengths` [pieces] are those of the documents they are parts of. A last, partial row
    without a target is left out.
    """
    ends = np.cumsum(pieces.lengths)
    total = int(ends[-1]) if len(ends) else 0
    stops = np.union1d(ends, np.arange(row_tokens, total, row_tokens))
    starts = np.concatenate([[0], stops[:-1]])[: len(stops)].astype(np.int64)
    place = np.searchsorted(ends, starts, side="right")
    begin = ends[place] - pieces.lengths[place]
    cut = Pieces(pieces.documents[place], pieces.starts[place] + starts - begin, stops - starts)
    # Only a document's last token has nothing to predict.
    targets = cut.lengths - (cut.starts + cut.lengths == document_lengths[place])
    offsets = np.searchsorted(starts // row_tokens, np.arange(-(-total // row_tokens) + 1))
    supervised = _sums(targets, offsets)
    if len(supervised) and not supervised[-1]:
        offsets, supervised = offsets[:-1], supervised[:-1]
        cut = cut.take(np.arange(offsets[-1]))
    placed = int(cut.lengths.sum())
    facts = dict.fromkeys(COUNTS, 0)
    facts |= {str(TrimRule.WHOLE): len(np.unique(pieces.documents)), "tokens": placed}
    return _by_work(
        cut, offsets, supervised, facts | {"removed_tokens": 0, "dropped_tokens": total - placed}
    )


def join_pieces(pieces: Pieces) -> Pieces:
    """Neighbours that continue one another as one piece."""
    ends = pieces.starts + pieces.lengths
    same = pieces.documents[1:] == pieces.documents[:-1]
    fresh = np.concatenate([[True], ~(same & (pieces.starts[1:] == ends[:-1]))])
    firsts = np.flatnonzero(fresh[: len(pieces.documents)])
    lengths = np.add.reduceat(pieces.lengths, firsts) if len(firsts) else pieces.lengths
    return Pieces(pieces.documents[firsts], pieces.starts[firsts], lengths)


def _by_work(
    pieces: Pieces,
    offsets: NDArray[np.int64],
    supervised: NDArray[np.int64],
    facts: Mapping[str, int],
) -> RowPlan:
    """Rows sorted by their work; rows of equal work keep their order."""
    work = _sums(pieces.lengths**2, offsets)
    facts = {**facts, "supervised_tokens": int(supervised.sum())}
    order = np.argsort(work, kind="stable")
    counts = np.diff(offsets)[order]
    sorted_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    shift = np.repeat(offsets[:-1][order] - sorted_offsets[:-1], counts)
    places = np.arange(sorted_offsets[-1]) + shift
    return RowPlan(pieces.take(places), sorted_offsets, supervised[order], work[order], facts)


def _sums(values: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums over values[offsets[r]:offsets[r + 1]], none of which is empty."""
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return running[offsets[1:]] - running[offsets[:-1]]
