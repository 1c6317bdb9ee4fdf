"""Rows of one corpus at one context length: plan once, then any row by number.

A row is what the model sees: tokens, next-token labels that never cross a document, and the
lengths of the documents in it. Conversations are trimmed and packed whole; plain text is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from zaya_train.config.errors import DataError
from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.data.order import permutation
from zaya_train.data.packing import Indices, PackedRows, TextRows, pack_best_fit, split_text
from zaya_train.data.sections import Rejected
from zaya_train.data.trim import TrimRule, trim, trim_sections

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zaya_train.data.corpus import Corpus

IGNORED_LABEL = IGNORE_LABEL


@dataclass(frozen=True, eq=False)
class Row:
    """One packed sequence of S tokens."""

    tokens: NDArray[np.int64]
    """[S]; positions after the last document hold the pad id."""
    labels: NDArray[np.int64]
    """[S] next token of the same document where it is a target, else -100. A text document cut by
    the row's end still has the first token of its next piece as its last label."""
    document_lengths: NDArray[np.int32]
    """[n] in order; their sum is the number of real tokens."""
    source: str
    documents: NDArray[np.int64]
    """[n] document numbers in the source's corpus."""


@dataclass(frozen=True)
class PlanReport:
    """What planning a corpus for one context did to its documents and tokens."""

    source: str
    row_tokens: int
    rows: int
    whole: int
    tail_cut: int
    earlier_dropped: int
    rejected: int
    """Documents left out: their answers exceed the context, or they hold no target."""
    tokens: int
    """Tokens placed in rows."""
    removed_tokens: int
    """Reasoning cut from documents that were placed."""
    dropped_tokens: int
    """Tokens of documents left out."""

    @property
    def utilisation(self) -> float:
        """Real tokens over row capacity."""
        return self.tokens / (self.rows * self.row_tokens)


class _Fit(NamedTuple):
    """Trimmed lengths of the documents that can be placed."""

    documents: Indices
    lengths: Indices
    counts: dict[TrimRule, int]


@dataclass(frozen=True, eq=False)
class RowSource:
    """A corpus planned for one context; made by `plan_rows`."""

    name: str
    corpus: Corpus = field(repr=False)
    row_tokens: int
    plan: PackedRows | TextRows = field(repr=False)
    report: PlanReport

    def __len__(self) -> int:
        return len(self.plan)

    def row(self, index: int) -> Row:
        """Row `index` of the plan, 0 to len - 1.

        Raises:
            DataError: a token id outside the vocabulary.
        """
        if isinstance(self.plan, TextRows):
            pieces = self.plan.row(index)
            parts = [self._text_piece(*piece) for piece in pieces]
            documents = [piece.document for piece in pieces]
        else:
            documents = self.plan.row(index).tolist()
            parts = [self._conversation(document) for document in documents]
        tokens = np.full(self.row_tokens, self.corpus.manifest.pad_id, dtype=np.int64)
        labels = np.full(self.row_tokens, IGNORED_LABEL, dtype=np.int64)
        position = 0
        for part_tokens, part_labels in parts:
            end = position + len(part_tokens)
            tokens[position:end], labels[position:end] = part_tokens, part_labels
            position = end
        lengths = np.array([len(part_tokens) for part_tokens, _ in parts], dtype=np.int32)
        return Row(tokens, labels, lengths, self.name, np.array(documents, dtype=np.int64))

    def _conversation(self, document: int) -> tuple[NDArray, NDArray]:
        sample = self.corpus.sample(document)
        kept = trim(sample, self.row_tokens)
        if isinstance(kept, Rejected):
            raise DataError(
                f"{self.corpus.path}: document {document} no longer fits its plan: {kept.detail}"
            )
        tokens, supervised = kept.tokens(sample), kept.supervised(sample)
        labels = np.full(len(tokens), IGNORED_LABEL, dtype=np.int64)
        np.copyto(labels[:-1], tokens[1:], where=supervised[1:])
        return tokens, labels

    def _text_piece(self, document: int, start: int, end: int) -> tuple[NDArray, NDArray]:
        following = self.corpus.tokens(document, start, end + 1)
        labels = np.full(end - start, IGNORED_LABEL, dtype=np.int64)
        labels[: len(following) - 1] = following[1:]
        return following[: end - start], labels


def plan_rows(
    name: str, corpus: Corpus, row_tokens: int, max_documents: int, order: tuple[object, ...]
) -> RowSource:
    """Plan a corpus for rows of `row_tokens`.

    Args:
        name: source name, for rows and messages.
        corpus: the corpus; `chat` is trimmed and packed, `text` is cut.
        row_tokens: context length S.
        max_documents: cap on documents in a packed row.
        order: names that choose the order in which text documents are laid end to end.

    Raises:
        DataError: not one row can be made.
    """
    if corpus.manifest.kind == "text":
        fit = _fit_text(corpus, order)
        plan: PackedRows | TextRows = split_text(fit.documents, fit.lengths, row_tokens)
    else:
        fit = _fit_conversations(corpus, row_tokens)
        plan = pack_best_fit(fit.documents, fit.lengths, row_tokens, max_documents)
    if not len(plan):
        shortest = int(corpus.lengths.min()) if len(corpus) else 0
        raise DataError(
            f"source {name!r} ({corpus.path}): no row at context_tokens={row_tokens}: none of "
            f"{len(corpus)} documents fits with its answer; the shortest has {shortest} tokens"
        )
    report = _report(name, corpus, row_tokens, fit, plan)
    return RowSource(name, corpus, row_tokens, plan, report)


def _fit_text(corpus: Corpus, order: tuple[object, ...]) -> _Fit:
    documents = permutation(len(corpus), *order, "documents")
    lengths = corpus.lengths[documents]
    usable = lengths > 1
    counts = {TrimRule.WHOLE: int(usable.sum())}
    return _Fit(documents[usable], lengths[usable], counts)


def _fit_conversations(corpus: Corpus, budget: int) -> _Fit:
    lengths = corpus.lengths.copy()
    usable = corpus.supervised_tokens > 0
    counts = {TrimRule.WHOLE: int((usable & (lengths <= budget)).sum())}
    for document in np.flatnonzero(usable & (lengths > budget)).tolist():
        kept = trim_sections(corpus.sections(document), budget)
        if isinstance(kept, Rejected):
            usable[document] = False
            continue
        lengths[document] = kept.length
        counts[kept.rule] = counts.get(kept.rule, 0) + 1
    documents = np.flatnonzero(usable)
    return _Fit(documents, lengths[documents], counts)


def _report(
    name: str, corpus: Corpus, row_tokens: int, fit: _Fit, plan: PackedRows | TextRows
) -> PlanReport:
    kept_tokens, original = int(fit.lengths.sum()), int(corpus.lengths[fit.documents].sum())
    placed = min(kept_tokens, len(plan) * row_tokens)
    return PlanReport(
        source=name,
        row_tokens=row_tokens,
        rows=len(plan),
        whole=fit.counts.get(TrimRule.WHOLE, 0),
        tail_cut=fit.counts.get(TrimRule.TAIL_CUT, 0),
        earlier_dropped=fit.counts.get(TrimRule.EARLIER_DROPPED, 0),
        rejected=len(corpus) - len(fit.documents),
        tokens=placed,
        removed_tokens=original - kept_tokens,
        dropped_tokens=corpus.manifest.tokens - original,
    )
