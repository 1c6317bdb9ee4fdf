"""Rows of one source: what the model sees, made from a plan and a corpus.

A row is tokens, next-token labels that never cross a document, and the lengths of the documents in
it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zaya_train.config.errors import DataError
from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.data.sections import Rejected
from zaya_train.data.trim import trim

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zaya_train.data.corpus import Corpus
    from zaya_train.data.row_plan import Pieces


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
    starts: NDArray[np.int64]
    """[n] first token of each piece, from its document's start."""
    fingerprint: int = 0
    """64-bit signed hash of the global sample index and of everything above; see the ledger."""


@dataclass(frozen=True)
class RowReader:
    """Turns a plan's pieces into rows."""

    source: str
    corpus: Corpus
    row_tokens: int
    loss_on: str

    def read(self, pieces: Pieces) -> Row:
        """The row that holds `pieces`.

        Raises:
            DataError: a token id outside the vocabulary, or a document that no longer is what was
                planned.
        """
        tokens = np.full(self.row_tokens, self.corpus.manifest.pad_id, dtype=np.int64)
        labels = np.full(self.row_tokens, IGNORE_LABEL, dtype=np.int64)
        text = self.corpus.manifest.kind == "text"
        position = 0
        for document, start, length in zip(*map(np.ndarray.tolist, pieces), strict=True):
            read = self._text_piece if text else self._conversation
            part_tokens, part_labels = read(document, start, length)
            end = position + length
            tokens[position:end], labels[position:end] = part_tokens, part_labels
            position = end
        lengths = pieces.lengths.astype(np.int32)
        return Row(tokens, labels, lengths, self.source, pieces.documents, pieces.starts)

    def _conversation(self, document: int, _: int, length: int) -> tuple[NDArray, NDArray]:
        sample = self.corpus.sample(document)
        kept = trim(sample, self.row_tokens)
        if isinstance(kept, Rejected) or kept.length != length:
            found = kept.detail if isinstance(kept, Rejected) else f"{kept.length} tokens"
            raise DataError(
                f"{self.corpus.path}: document {document} is not what was planned: {found}, "
                f"{length} planned"
            )
        tokens, supervised = kept.tokens(sample), kept.supervised(sample)
        labels = np.full(len(tokens), IGNORE_LABEL, dtype=np.int64)
        targets = supervised[1:] if self.loss_on == "assistant" else True
        np.copyto(labels[:-1], tokens[1:], where=targets)
        return tokens, labels

    def _text_piece(self, document: int, start: int, length: int) -> tuple[NDArray, NDArray]:
        following = self.corpus.tokens(document, start, start + length + 1)
        if len(following) < length:
            raise DataError(
                f"{self.corpus.path}: document {document} ends after {len(following)} tokens from "
                f"{start} on, {length} planned"
            )
        labels = np.full(length, IGNORE_LABEL, dtype=np.int64)
        labels[: len(following) - 1] = following[1:]
        return following[:length], labels


def fingerprint(index: int, row: Row) -> int:
    """64-bit signed hash of what global sample `index` is: source, documents, parts and tokens."""
    digest = hashlib.blake2b(f"{index}\x1f{row.source}\x1f".encode(), digest_size=8)
    for array in (row.documents, row.starts, row.document_lengths, row.tokens, row.labels):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
