"""`trim` for all documents of a corpus at once: lengths and outcomes, as planning needs them.

Documents are taken in blocks, so that memory beyond the result does not grow with the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zaya_train.data.sections import Kind, Role
from zaya_train.data.trim import TrimRule

if TYPE_CHECKING:
    from zaya_train.data.corpus import Corpus
    from zaya_train.data.sections import Sections

RULES = (TrimRule.WHOLE, TrimRule.TAIL_CUT, TrimRule.EARLIER_DROPPED)
"""Outcome codes of kept documents are places in this tuple."""
REJECTED, UNSUPERVISED = len(RULES), len(RULES) + 1
_BLOCK_DOCUMENTS = 1 << 18

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TrimTable:
    """Every document at one budget."""

    lengths: NDArray[np.int64]
    """[documents] tokens kept; 0 for those left out."""
    supervised: NDArray[np.int64]
    """[documents] targets among them."""
    outcomes: NDArray[np.uint8]
    """[documents] place in RULES, REJECTED or UNSUPERVISED."""

    def count(self, outcome: int) -> int:
        """Documents of one outcome."""
        return int((self.outcomes == outcome).sum())


class _Reasoning(NamedTuple):
    """Per document of a block: the reasoning that may be cut, and the earlier blocks."""

    start: Counts
    """[n] first token of the last turn's last reasoning, from the document's start."""
    end: Counts
    supervised: Counts
    """[n] 1 if that reasoning is a target."""
    earlier: Counts
    """[n] tokens of all other reasoning blocks, two markers each included."""
    earlier_supervised: Counts


def trim_all(corpus: Corpus, budget: int, loss_on: str = "assistant") -> TrimTable:
    """What `trim` makes of every document at `budget` tokens.

    With `loss_on` "all" every token but a document's first is a target, whatever its section says.
    """
    parts = [
        _trim_block(corpus, first, min(first + _BLOCK_DOCUMENTS, len(corpus)), budget, loss_on)
        for first in range(0, len(corpus), _BLOCK_DOCUMENTS)
    ]
    return TrimTable(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _trim_block(
    corpus: Corpus, first: int, stop: int, budget: int, loss_on: str
) -> tuple[Counts, Counts, NDArray[np.uint8]]:
    offsets = corpus.index.spans(first, stop)
    total = np.diff(offsets)
    rows, row_counts = corpus.section_block(first, stop)
    document = np.repeat(np.arange(stop - first), row_counts)
    supervised = total - 1
    if loss_on == "assistant":
        supervised = _sum_by(document, _lengths(rows) * rows["supervised"], stop - first)
    found = _reasoning(rows, document, stop - first)
    last = found.end - found.start
    excess = np.maximum(total - budget, 0)
    drop = (excess > last) & (found.earlier > 0)
    still = np.maximum(excess - np.where(drop, found.earlier, 0), 0)
    rejected = still > last
    cut = np.where(rejected, 0, still)
    cut = _whole_characters(corpus, offsets[:-1], found, cut)
    outcomes = np.where(excess > 0, 1 + drop, 0).astype(np.uint8)
    outcomes[rejected] = REJECTED
    outcomes[supervised <= 0] = UNSUPERVISED
    kept = outcomes < len(RULES)
    lengths = np.where(kept, total - cut - np.where(drop, found.earlier, 0), 0)
    left = lengths - 1
    if loss_on == "assistant":
        left = supervised - cut * found.supervised - np.where(drop, found.earlier_supervised, 0)
    return lengths, np.where(kept, left, 0), outcomes


def _reasoning(rows: Sections, document: Counts, count: int) -> _Reasoning:
    places = np.flatnonzero(rows["kind"] == Kind.REASONING)
    sizes = _lengths(rows)
    whole = _sum_by(document[places], sizes[places] + 2, count)
    flagged = (sizes[places] + 2) * rows["supervised"][places].astype(np.int64)
    whole_supervised = _sum_by(document[places], flagged, count)
    last_reasoning, last_turn = np.full(count, -1), np.full(count, -1)
    # Of repeated indices the last assignment holds.
    last_reasoning[document[places]] = places
    assistant = np.flatnonzero(rows["role"] == Role.ASSISTANT)
    last_turn[document[assistant]] = rows["turn"][assistant]
    found = last_reasoning >= 0
    found &= rows["turn"][last_reasoning] == last_turn
    row = rows[last_reasoning]
    start = np.where(found, row["start"], 0).astype(np.int64)
    end = np.where(found, row["end"], 0).astype(np.int64)
    supervised = np.where(found, row["supervised"], 0).astype(np.int64)
    own: Counts = np.where(found, end - start + 2, 0)
    earlier_supervised = whole_supervised - own * supervised
    return _Reasoning(start, end, supervised, whole - own, earlier_supervised)


def _whole_characters(corpus: Corpus, offsets: Counts, found: _Reasoning, cut: Counts) -> Counts:
    """Cuts moved to the start of the character they fall into, as `trim` moves them."""
    cut = cut.copy()
    pending = np.flatnonzero(cut > 0)
    while len(pending):
        place = found.end[pending] - cut[pending]
        pending = pending[place > found.start[pending]]
        place = found.end[pending] - cut[pending]
        if not len(pending) or not corpus.continues.any():
            break
        pending = pending[corpus.continues[corpus.token_file.gather(offsets[pending] + place)]]
        cut[pending] += 1
    return cut


def _lengths(rows: Sections) -> Counts:
    return rows["end"].astype(np.int64) - rows["start"]


def _sum_by(keys: Counts, values: Counts, count: int) -> Counts:
    """Sums per key; exact, for token counts stay far below 2^53."""
    return np.bincount(keys, weights=values, minlength=count).astype(np.int64)
