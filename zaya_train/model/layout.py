"""Where every local token stands: the only source of document boundaries for the model.

Legend: B batch, S local sequence, n chunks per row on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from zaya_kernels.attention.segments import AttentionPlan, Segment, plan_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """Document structure of one rank's part of a packed batch.

    Built once per batch by `SequenceLayout.of_documents` from document lengths; under context
    parallelism with the chunks of the row that this rank holds.
    """

    positions: Tensor
    """[B, S] int64: token's position in its document, 0 at the start."""
    valid: Tensor
    """[B, S] bool: False on the padding behind a row's last document."""
    attention: AttentionPlan
    """Which local queries meet which keys of the (gathered) row."""

    @staticmethod
    def whole_rows(batch: int, sequence: int, device: torch.device) -> SequenceLayout:
        """Every row is one document."""
        return SequenceLayout.of_documents([[sequence]] * batch, sequence, device)

    @staticmethod
    def of_documents(
        lengths: Sequence[Sequence[int]],
        row_tokens: int,
        device: torch.device,
        chunks: Sequence[tuple[int, int]] | None = None,
    ) -> SequenceLayout:
        """Layout of rows of `row_tokens` tokens whose documents have the given lengths.

        A row's documents lie side by side from its start; what is left is padding, which behaves
        as one more document that nothing is learned from. `chunks` are the [start, end) ranges of
        the row held by this rank, in local order; None for the whole row. ValueError where lengths
        exceed the row.
        """
        chunks = chunks or [(0, row_tokens)]
        spans = [_document_spans(row, row_tokens) for row in lengths]
        sequence = sum(end - start for start, end in chunks)
        positions = torch.empty(len(spans), sequence, dtype=torch.int64)
        valid = torch.empty(len(spans), sequence, dtype=torch.bool)
        segments: list[Segment] = []
        for b, (row, documents) in enumerate(zip(spans, lengths, strict=True)):
            table = _row_positions(row, row_tokens)
            used = sum(documents)
            local = torch.cat([torch.arange(start, end) for start, end in chunks])
            positions[b] = table[local]
            valid[b] = local < used
            segments += row_segments(row, chunks, b * sequence, b * row_tokens)
        whole = chunks == [(0, row_tokens)] and all(len(row) == 1 for row in spans)
        plan = plan_attention(segments, len(spans) * sequence, device, whole)
        return SequenceLayout(positions.to(device), valid.to(device), plan)


def _document_spans(lengths: Sequence[int], row_tokens: int) -> list[tuple[int, int]]:
    """[start, end) of each document and of the padding behind them."""
    spans, start = [], 0
    for length in lengths:
        if length <= 0:
            raise ValueError(f"a document of {length} tokens in a packed row")
        spans.append((start, start + length))
        start += length
    if start > row_tokens:
        raise ValueError(f"documents of {start} tokens in a row of {row_tokens}")
    if start < row_tokens:
        spans.append((start, row_tokens))
    return spans


def _row_positions(spans: Sequence[tuple[int, int]], row_tokens: int) -> Tensor:
    starts = torch.tensor([start for start, _ in spans])
    lengths = torch.tensor([end - start for start, end in spans])
    return torch.arange(row_tokens) - torch.repeat_interleave(starts, lengths)


def row_segments(
    spans: Sequence[tuple[int, int]],
    chunks: Sequence[tuple[int, int]],
    query_base: int,
    key_base: int,
) -> list[Segment]:
    """Overlaps of documents with local chunks, as attention segments."""
    segments, local = [], query_base
    for chunk_start, chunk_end in chunks:
        for start, end in spans:
            first, last = max(start, chunk_start), min(end, chunk_end)
            if first < last:
                segments.append(
                    Segment(
                        local + first - chunk_start, last - first, key_base + start, last - start
                    )
                )
        local += chunk_end - chunk_start
    return segments
