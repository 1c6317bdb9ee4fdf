"""One source over the phases of a run: which of its rows each draw takes.

A phase goes on where the phase before stopped. With the same context, and the loss on the same
tokens, it draws on from the same plan. Otherwise the rows that are left of the epoch under way are
taken apart and planned anew, come first, and whole epochs of the new plan follow. So no part of a
document is seen twice, and none is skipped, within an epoch, whatever phases and mixtures did
before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zaya_train.config.errors import DataError
from zaya_train.data.order import balanced_row, permutation, rows_left
from zaya_train.data.plan_store import StoredPlan, plan_key, stored_plan
from zaya_train.data.row_plan import (
    Pieces,
    PlanSpec,
    RowPlan,
    join_pieces,
    plan_documents,
    plan_text,
)
from zaya_train.data.rows import Row, RowReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from zaya_train.data.corpus import Corpus

PLANS = "plans"


class Draws(NamedTuple):
    """Rows drawn from the plans of one context."""

    row_tokens: int
    loss_on: str
    rows: int


@dataclass(frozen=True)
class Past:
    """Rows drawn from a source by earlier phases, from the plans of one context after the other."""

    draws: tuple[Draws, ...] = ()
    """Neighbours differ in context or in what the loss is on."""

    def then(self, row_tokens: int, loss_on: str, rows: int) -> Past:
        """With `rows` more rows."""
        if not rows:
            return self
        if self.draws and self.draws[-1][:2] == (row_tokens, loss_on):
            rows += self.draws[-1].rows
            return Past((*self.draws[:-1], Draws(row_tokens, loss_on, rows)))
        return Past((*self.draws, Draws(row_tokens, loss_on, rows)))


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """A source as one phase wants it."""

    name: str
    seed: int
    spec: PlanSpec
    max_documents: int | None = None
    plan_dir: str | None = None
    past: Past = field(default_factory=Past)


@dataclass(frozen=True)
class PlanReport:
    """What planning a corpus for one context did to its documents and tokens."""

    source: str
    row_tokens: int
    rows: int
    """In an epoch at this context."""
    carried_rows: int
    """Left over by earlier phases; they come first."""
    whole: int
    tail_cut: int
    earlier_dropped: int
    rejected: int
    """Documents whose answers exceed the context."""
    unsupervised: int
    """Documents without a target."""
    tokens: int
    """Tokens placed in rows."""
    removed_tokens: int
    """Reasoning cut from documents that were placed."""
    dropped_tokens: int
    """Tokens of documents left out."""
    supervised_tokens: int
    """Targets in an epoch's rows."""

    @property
    def utilisation(self) -> float:
        """Real tokens over row capacity."""
        return self.tokens / (self.rows * self.row_tokens)


@dataclass(frozen=True, eq=False)
class RowSource:
    """A corpus planned for one phase; made by `open_source`. Draws are counted from 0."""

    name: str
    corpus: Corpus = field(repr=False)
    request: SourceRequest
    plan: StoredPlan = field(repr=False)
    carried: StoredPlan | None = field(repr=False)
    """Rows that earlier phases at other contexts left of their epoch."""
    drawn_before: int
    """Draws from these two plans by earlier phases."""
    report: PlanReport

    def describe(self) -> dict[str, Any]:
        """Everything its rows follow from, as plain JSON values."""
        return {
            "content": self.corpus.manifest.content_sha256,
            "plan": self.plan.key,
            "carried": self.carried.key if self.carried is not None else None,
            "drawn_before": self.drawn_before,
            "loss_on": self.request.spec.loss_on,
            "balance_rows": self.request.spec.balance_rows,
        }

    def locate(self, draw: int) -> tuple[StoredPlan, int]:
        """Plan and row of the plan that a draw takes."""
        plan, ordinal, names = self._turn(draw + self.drawn_before)
        return plan, balanced_row(ordinal, len(plan), self.request.spec.balance_rows, *names)

    def left(self) -> Pieces:
        """Pieces of all rows that the epoch under way has left before the first draw."""
        plan, ordinal, names = self._turn(self.drawn_before)
        if plan is self.carried and not ordinal:
            rows = np.ones(len(plan), dtype=np.bool_)
        else:
            rows = rows_left(ordinal, len(plan), self.request.spec.balance_rows, *names)
        pieces, offsets = plan.rows()
        return pieces.take(np.flatnonzero(np.repeat(rows, np.diff(offsets))))

    def _turn(self, ordinal: int) -> tuple[StoredPlan, int, tuple[object, ...]]:
        """Plan whose turn it is, which of its draws that is, and the names of its order."""
        names = (self.request.seed, self.name, self.request.spec.row_tokens)
        if self.carried is not None:
            if ordinal < len(self.carried):
                return self.carried, ordinal, (*names, "carried", self.carried.key)
            ordinal -= len(self.carried)
        return self.plan, ordinal, names

    def begins_epoch(self, draw: int) -> bool:
        """Whether a draw is the first of a whole pass over the plan of this context."""
        ordinal = draw + self.drawn_before - (len(self.carried) if self.carried else 0)
        return ordinal >= 0 and ordinal % len(self.plan) == 0

    def pieces(self, draw: int) -> Pieces:
        """What stands in a draw's row."""
        plan, row = self.locate(draw)
        return plan.row(row)

    def work(self, draw: int) -> int:
        """Attention work of a draw's row: sum of squared piece lengths."""
        plan, row = self.locate(draw)
        return plan.work(row)

    def row(self, draw: int) -> Row:
        """A draw's row.

        Raises:
            DataError: a token id outside the vocabulary, a changed corpus.
        """
        return self.reader.read(self.pieces(draw))

    @property
    def reader(self) -> RowReader:
        """Makes rows of pieces."""
        spec = self.request.spec
        return RowReader(self.name, self.corpus, spec.row_tokens, spec.loss_on)

    def epochs(self, drawn: int) -> float:
        """Passes over the plan of this context that `drawn` draws make."""
        return drawn / len(self.plan)


def open_source(corpus: Corpus, request: SourceRequest) -> RowSource:
    """Plan a corpus for a phase, or read the plan made before.

    Raises:
        DataError: not one row can be made.
        StorageError: the plan cannot be stored.
    """
    planner = _Planner(corpus, request)
    plan = planner.full()
    if not len(plan):
        shortest = int(corpus.lengths.min()) if len(corpus) else 0
        raise DataError(
            f"source {request.name!r} ({corpus.path}): no row at context_tokens="
            f"{request.spec.row_tokens}: none of {len(corpus)} documents fits with its answer; the "
            f"shortest has {shortest} tokens"
        )
    before, drawn = planner.split(request.past)
    carried = planner.carried(before) if before.draws else None
    facts = plan.facts
    report = PlanReport(
        source=request.name,
        row_tokens=request.spec.row_tokens,
        rows=len(plan),
        carried_rows=max(0, len(carried) - drawn) if carried else 0,
        **{name: facts[name] for name in _FACTS},
    )
    return RowSource(request.name, corpus, request, plan, carried, drawn, report)


_FACTS = (
    "whole",
    "tail_cut",
    "earlier_dropped",
    "rejected",
    "unsupervised",
    "tokens",
    "removed_tokens",
    "dropped_tokens",
    "supervised_tokens",
)


@dataclass(frozen=True)
class _Planner:
    """Finds or makes the plans of one source."""

    corpus: Corpus
    request: SourceRequest

    def split(self, past: Past) -> tuple[Past, int]:
        """What was drawn before the present context, and draws already made at it."""
        spec = self.request.spec
        if past.draws and past.draws[-1][:2] == (spec.row_tokens, spec.loss_on):
            return Past(past.draws[:-1]), past.draws[-1].rows
        return past, 0

    def full(self) -> StoredPlan:
        """Plan of a whole epoch."""
        spec = self.request.spec

        def make() -> RowPlan:
            chosen = self._chosen()
            if self.corpus.manifest.kind == "chat":
                return plan_documents(self.corpus, spec, chosen)
            return self._text(self._whole_text(chosen), spec)

        return self._stored((), lambda: make)

    def carried(self, past: Past) -> StoredPlan:
        """Plan of what `past` left of its epoch; maybe without a row."""

        def prepare() -> Callable[[], RowPlan]:
            earlier = self._earlier(past)
            return lambda: make(earlier)

        def make(earlier: RowSource) -> RowPlan:
            left = earlier.left()
            if self.corpus.manifest.kind == "chat":
                return plan_documents(self.corpus, self.request.spec, left.documents)
            return self._text(left, self.request.spec)

        return self._stored(past.draws, prepare)

    def _earlier(self, past: Past) -> RowSource:
        """The source as the phase that made the last draws of `past` would go on with it."""
        row_tokens, loss_on, _ = past.draws[-1]
        spec = replace(self.request.spec, row_tokens=row_tokens, loss_on=loss_on)
        return open_source(self.corpus, replace(self.request, past=past, spec=spec))

    def _text(self, pieces: Pieces, spec: PlanSpec) -> RowPlan:
        """Plan of text pieces, put back into the order of the documents."""
        rank = np.empty(len(self.corpus), dtype=np.int64)
        rank[self._document_order()] = np.arange(len(self.corpus))
        order = np.lexsort((pieces.starts, rank[pieces.documents]))
        joined = join_pieces(pieces.take(order))
        return plan_text(joined, self.corpus.lengths[joined.documents], spec.row_tokens)

    def _whole_text(self, chosen: NDArray[np.int64] | None) -> Pieces:
        documents = np.arange(len(self.corpus)) if chosen is None else chosen
        lengths = self.corpus.lengths[documents]
        usable = lengths > 1
        return Pieces(documents[usable], np.zeros(int(usable.sum()), np.int64), lengths[usable])

    def _document_order(self) -> NDArray[np.int64]:
        return permutation(len(self.corpus), self.request.seed, self.request.name, "documents")

    def _chosen(self) -> NDArray[np.int64] | None:
        if self.request.max_documents is None:
            return None
        return np.sort(self._document_order()[: self.request.max_documents])

    def _stored(
        self, past: tuple[Draws, ...], prepare: Callable[[], Callable[[], RowPlan]]
    ) -> StoredPlan:
        spec = self.request.spec
        text = self.corpus.manifest.kind == "text"
        seeded = text or past or self.request.max_documents
        key = plan_key(
            {
                "corpus": self.corpus.manifest.content_sha256,
                "row_tokens": spec.row_tokens,
                "max_documents_per_row": spec.max_documents,
                "loss_on": spec.loss_on,
                "past": past,
                "max_documents": self.request.max_documents,
                # Conversations of a whole corpus are packed alike under every seed and name.
                "order": [self.request.seed, self.request.name] if seeded else None,
                "balance_rows": spec.balance_rows if past or not text else None,
            }
        )
        folder = Path(self.request.plan_dir) if self.request.plan_dir else self.corpus.path / PLANS
        return stored_plan(folder, key, prepare)
