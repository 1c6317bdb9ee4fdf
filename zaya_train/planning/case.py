"""One phase on a number of ranks, as the arithmetic of the planner takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_kernels.attention.segments import padded_length
from zaya_kernels.dtypes import DTYPES

from zaya_train.config.derive import layout, sequences_per_step
from zaya_train.model.layout import row_segments
from zaya_train.parallel.sequence import Chunking
from zaya_train.parallel.traffic import Traffic, Work

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zaya_train.config.derive import Layout
    from zaya_train.config.schema import ModelConfig, ParallelConfig, PhaseConfig, TrainConfig


@dataclass(frozen=True)
class Case:
    """A rank's share of a step; rank 0's, whose shards are the largest."""

    config: TrainConfig
    name: str
    """Of the phase."""
    ranks: int
    busiest: float = 1.0
    """Tokens of each layer's first expert over an even share; matters under expert parallelism."""

    @property
    def phase(self) -> PhaseConfig:
        return self.config.plan.phases[self.name]

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    @property
    def layout(self) -> Layout:
        return layout(self.phase, self.parallel, self.ranks)

    @property
    def unit(self) -> int:
        """Rows of a micro-batch over all data ranks."""
        return self.layout.data * self.phase.micro_batch_sequences

    @property
    def micro_batches(self) -> int:
        """Of a full step, on every rank."""
        return sequences_per_step(self.phase) // self.unit

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on this rank."""
        return self.phase.context_tokens // self.layout.context * self.phase.micro_batch_sequences

    @property
    def received(self) -> int:
        """Tokens that this rank's experts get of a micro-batch, ranks being alike: its first expert
        `busiest` shares, all others alike what is left."""
        experts, own = self.model.num_experts, self.model.num_experts // self.layout.expert
        first = min(1.0, self.busiest / experts)
        others = (1 - first) / max(1, experts - 1)
        return round(self.layout.expert * self.tokens * (first + (own - 1) * others))

    @property
    def compute_bytes(self) -> int:
        """Of an element of weights and activations."""
        return DTYPES[self.config.precision.compute_dtype].itemsize

    def traffic(self) -> Traffic:
        """Collectives of a step, the optimizer's aside; no token skips its expert."""
        passes = self.model.num_layers * self.micro_batches
        rows, length = self.phase.micro_batch_sequences, self.phase.context_tokens
        sent, received = passes * self.tokens, passes * self.received
        work = Work(self.micro_batches, rows, length, sent, received)
        return Traffic(self.model, self.parallel, self.config.precision, self.layout, work)


def cases_of(
    config: TrainConfig, ranks: int, names: Iterable[str] = (), busiest: float = 1.0
) -> list[Case]:
    """Phases `names` of a plan on `ranks` ranks, or all."""
    return [Case(config, name, ranks, busiest) for name in names or config.plan.phases]


def halving_documents(row_tokens: int) -> list[int]:
    """Lengths of documents that halve, each one token longer than attention pads well: what the
    rehearsal packs a row with, and the planner counts on."""
    lengths, left = [], row_tokens
    while left > 64:
        lengths.append(left // 2 + 1)
        left -= lengths[-1]
    return [*lengths, left]


def padded_queries(case: Case) -> int:
    """Queries that attention computes for a micro-batch of `halving_documents`, with padding."""
    degrees, length = case.layout, case.phase.context_tokens
    chunking = Chunking(degrees.context, case.parallel.context_chunks == "head_tail")
    spans, start = [], 0
    for size in halving_documents(length):
        spans.append((start, start + size))
        start += size
    segments = row_segments(spans, chunking.ranges_of(0, length), 0, 0)
    if len(spans) == 1 and degrees.context == 1:
        return case.tokens
    queries = sum(
        padded_length(s.query_count) if s.query_count == s.key_count else s.query_count
        for s in segments
    )
    return queries * case.phase.micro_batch_sequences
