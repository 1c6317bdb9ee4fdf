"""What a rank hands to each collective in one optimizer step, from the configuration alone.

`tests/dist/test_traffic.py` holds this arithmetic against counted bytes; the optimizer's own
exchange (Muon) is not in it. Bytes are operands: what this rank contributes, its own part of an
all-gather, the whole buffer of a reduce-scatter or all-reduce, everything an all-to-all sends.

Legend: B rows of a micro-batch, S row tokens, D hidden, K KV heads, d head dim, H query heads,
E experts, n chunks per rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from zaya_kernels.dtypes import DTYPES

from zaya_train.model.shapes import parameter_shapes
from zaya_train.parallel.sequence import Chunking

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zaya_train.config.derive import Layout
    from zaya_train.config.precision import PrecisionConfig
    from zaya_train.config.schema import ModelConfig, ParallelConfig

_INT64_BYTES = _FP64_BYTES = 8
_SIGNALS = 64


@dataclass(frozen=True)
class Flow:
    """One row of the table."""

    what: str
    kind: str
    """all_gather, reduce_scatter, all_reduce or all_to_all."""
    axis: str
    """Of the mesh, or world."""
    bytes: int
    """Operand bytes per rank and optimizer step."""
    calls: int


@dataclass(frozen=True)
class Work:
    """A rank's share of one step."""

    micro_batches: int
    rows: int
    """Per micro-batch."""
    row_tokens: int
    sent_tokens: int
    """Tokens this rank sends to experts, all layers and micro-batches together."""
    received_tokens: int
    """Tokens its experts receive."""


@dataclass(frozen=True)
class Traffic:
    """Everything the bytes follow from."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    layout: Layout
    work: Work

    def flows(self) -> list[Flow]:
        """Every collective of a step that moves anything; groups of one rank move nothing."""
        rows = [*self._weights(), *self._context(), *self._experts(), *self._scalars()]
        return [row for row in rows if row.bytes]

    @property
    def _compute_bytes(self) -> int:
        return DTYPES[self.precision.compute_dtype].itemsize

    @property
    def _forwards(self) -> int:
        """Forward passes through a layer's exchanges per micro-batch."""
        return 2 if self.parallel.recompute == "full" else 1

    def _weights(self) -> Iterable[Flow]:
        dense, part = _elements(self.model, self.layout.fsdp, self.layout.expert)
        layers = self.model.num_layers
        yield from self._unit("weights", "fsdp", dense, (self.layout.fsdp, layers + 1))
        ranks = self.layout.expert_shard
        yield from self._unit("experts' weights", "expert_shard", part, (ranks, layers))

    def _unit(self, what: str, axis: str, elements: int, over: tuple[int, int]) -> Iterable[Flow]:
        """`elements` on this rank; `over`: ranks they are sharded over, and FSDP's units."""
        ranks, units = over
        micro, mode = self.work.micro_batches, self.parallel.accumulation
        reduce_bytes = DTYPES[self.precision.reduce_dtype].itemsize
        gathers = 2 * micro if self.parallel.reshard_after_forward else 1
        gradients = f"{what}' gradients".replace("s''", "s'")
        if ranks > 1:
            size = elements * self._compute_bytes * gathers
            yield Flow(what, "all_gather", axis, size, units * gathers)
            times = 1 if mode == "keep_unsharded" else micro
            size = elements * ranks * reduce_bytes * times
            yield Flow(gradients, "reduce_scatter", axis, size, units * times)
        if self.layout.replicate > 1:
            times = micro if mode == "reduce_each" else 1
            size = elements * reduce_bytes * times
            yield Flow(gradients, "all_reduce", "replicate", size, units * times)

    def _context(self) -> Iterable[Flow]:
        ranks = self.layout.context
        if ranks == 1:
            return
        model, work = self.model, self.work
        calls = model.num_layers * work.micro_batches
        head_tail = self.parallel.context_chunks == "head_tail"
        chunks = Chunking(ranks, head_tail).per_rank
        halo_rows = model.conv_depthwise_taps + model.conv_grouped_taps - 2
        heads = model.num_query_heads + model.num_kv_heads
        delayed = model.num_kv_heads * model.head_dim // 2
        keys = 2 * work.row_tokens // ranks * model.num_kv_heads * model.head_dim
        # Halos are exchanged outside what is made again selectively, inside whole layers.
        for what, elements in (
            ("keys and values", keys),
            ("halo of the convolutions", chunks * halo_rows * heads * model.head_dim),
            ("halo of the delayed values", chunks * delayed),
        ):
            size = work.rows * elements * calls * self._compute_bytes
            again = self._forwards
            yield Flow(what, "all_gather", "context", size * again, calls * again)
            # Added up in fp32 where they arrive; see `collectives.all_gather`.
            yield Flow(f"{what}, gradients", "all_to_all", "context", size * ranks, calls)

    def _experts(self) -> Iterable[Flow]:
        if self.layout.expert == 1:
            return
        model, work = self.model, self.work
        calls = model.num_layers * work.micro_batches
        counts = calls * model.num_experts * _INT64_BYTES
        row = model.hidden_size * self._compute_bytes
        there, back = work.sent_tokens * row, work.received_tokens * row
        yield Flow("token counts", "all_to_all", "expert", counts, calls)
        forward, again = (there + back) * self._forwards, 2 * calls * self._forwards
        yield Flow("tokens to experts and back", "all_to_all", "expert", forward, again)
        yield Flow("tokens, gradients", "all_to_all", "expert", there + back, 2 * calls)

    def _scalars(self) -> Iterable[Flow]:
        classes = self.model.num_experts + int(self.model.skip_class)
        report = (2 + _SIGNALS + self.model.num_layers * classes) * _FP64_BYTES
        sums = "supervised tokens, fingerprint, attention pairs"
        yield Flow(sums, "all_reduce", "world", 3 * _INT64_BYTES, 1)
        yield Flow("losses, signals, load", "all_reduce", "world", report, 1)
        # Every rank's sum of squares and sum of bits, which replicas are compared by.
        norm = self.layout.world * (_FP64_BYTES + _INT64_BYTES)
        yield Flow("gradient norm", "all_reduce", "world", norm, 1)


@lru_cache(maxsize=256)
def _elements(model: ModelConfig, fsdp: int, expert: int) -> tuple[int, int]:
    """Of rank 0's shards: weights gathered over fsdp, and experts' over expert_shard."""
    shapes = parameter_shapes(model)
    own = {n for n in shapes if expert > 1 and ".experts." in n}
    dense = _shard_elements((shapes[n] for n in shapes.keys() - own), fsdp)
    divided = ((shapes[n][0] // expert, *shapes[n][1:]) for n in own)
    return dense, _shard_elements(divided, fsdp // expert)


def _shard_elements(shapes: Iterable[tuple[int, ...]], ranks: int) -> int:
    """Elements of one rank's shards, padded to equal rows along dim 0 as FSDP gathers them."""
    total = 0
    for first, *rest in shapes:
        total += -(-first // ranks) * torch.Size(rest).numel()
    return total
