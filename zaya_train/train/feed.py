"""A phase's rows to a rank's micro-batches, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from zaya_train.config.derive import phase_sequences
from zaya_train.phases.plan import batch_sequences
from zaya_train.train.batch import Batch, make_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from zaya_train.config.schema import PhaseConfig
    from zaya_train.parallel.mesh import Mesh
    from zaya_train.parallel.sequence import Chunking
    from zaya_train.train.batch import PackedRow


class Rows(Protocol):
    """Rows by global sample index; see data.stream.PhaseStream."""

    def row(self, index: int) -> PackedRow: ...

    def by_work(self, first: int, stop: int) -> Sequence[int]:
        """Indices [first, stop), the most attention work first."""
        ...

    def drawn(self, index: int) -> dict[str, int]:
        """Rows of every source among 0 to index - 1."""
        ...


@dataclass(frozen=True)
class Feed:
    """This rank's part of every step."""

    rows: Rows
    phase: PhaseConfig
    mesh: Mesh
    chunking: Chunking
    device: torch.device
    unit: int
    """Rows of one micro-batch over all data ranks."""

    def batches(self, consumed: int) -> list[Batch]:
        """Micro-batches of the step that starts after `consumed` rows of the phase.

        Rows that are neighbours in attention work make one micro-batch over all ranks, dealt to
        them in turn, so that none waits for another.
        """
        dealt = self.dealt(consumed)[self.mesh.data_rank]
        size = self.unit // self.mesh.layout.data
        return [
            make_batch(
                [self.rows.row(index) for index in dealt[start : start + size]],
                self.chunking,
                self.mesh.context_rank,
                self.device,
            )
            for start in range(0, len(dealt), size)
        ]

    def dealt(self, consumed: int) -> list[list[int]]:
        """Rows of that step by data rank, in the order in which each takes them."""
        count = batch_sequences(self.phase, consumed, self.unit)
        order = self.rows.by_work(consumed, consumed + count)
        ranks = self.mesh.layout.data
        return [list(order[first::ranks]) for first in range(ranks)]


def step_starts(phase: PhaseConfig, consumed: int, unit: int) -> Iterator[int]:
    """Rows consumed before each remaining step."""
    while consumed < phase_sequences(phase):
        yield consumed
        consumed += batch_sequences(phase, consumed, unit)
