"""Packed rows to the tensors a rank's forward pass takes.

Legend: B rows of a micro-batch, S row tokens, n context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.model.flops import document_pairs
from zaya_train.model.layout import SequenceLayout
from zaya_train.parallel.sequence import local_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from zaya_train.parallel.sequence import Chunking


class PackedRow(Protocol):
    """What the loader delivers; see data.rows.Row."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """[S]."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """[S], shifted, IGNORE_LABEL where nothing is supervised."""
        ...

    @property
    def document_lengths(self) -> NDArray[np.int32]:
        """[documents], padding behind them."""
        ...

    @property
    def fingerprint(self) -> int:
        """64-bit signed hash of what the row is, for the ledger."""
        ...


@dataclass(frozen=True)
class Batch:
    """One rank's part of a micro-batch."""

    tokens: Tensor
    """[B, S / n] int64."""
    labels: Tensor
    """[B, S / n] int64; IGNORE_LABEL carries weight zero, everything else weight one."""
    layout: SequenceLayout
    supervised: int
    """Labels that are not IGNORE_LABEL."""
    fingerprint: int = 0
    """Sum of the rows' fingerprints modulo 2^64, signed; 0 on all context-parallel ranks of a group
    but the first, which share the rows."""
    pairs: int = 0
    """Pairs of a query and a key it may see (model.flops) of the rows; 0 as `fingerprint`."""


def make_batch(
    rows: Sequence[PackedRow], chunking: Chunking, rank: int, device: torch.device
) -> Batch:
    """This context-parallel rank's part of `rows`; the same rows on every rank of its group."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    labels = local_part(torch.from_numpy(np.stack([row.labels for row in rows])), chunking, rank)
    row_tokens = tokens.shape[1]
    ranges = chunking.ranges_of(rank, row_tokens) if chunking.ranks > 1 else None
    lengths = [row.document_lengths.tolist() for row in rows]
    layout = SequenceLayout.of_documents(lengths, row_tokens, device, ranges)
    return Batch(
        tokens=local_part(tokens, chunking, rank).to(device),
        labels=labels.to(device),
        layout=layout,
        supervised=int((labels != IGNORE_LABEL).sum()),
        fingerprint=wrapped_sum(row.fingerprint for row in rows) if rank == 0 else 0,
        pairs=document_pairs(n for row in lengths for n in row) if rank == 0 else 0,
    )


def wrapped_sum(values: Iterable[int]) -> int:
    """Sum modulo 2^64 as a signed number, as int64 tensors add."""
    return (sum(values) + (1 << 63)) % (1 << 64) - (1 << 63)


def without_labels(batch: Batch) -> Batch:
    """The same forward pass, supervising nothing: for ranks that have no row of their own but must
    take part in collectives."""
    return Batch(batch.tokens, torch.full_like(batch.labels, IGNORE_LABEL), batch.layout, 0)
