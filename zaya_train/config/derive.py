"""Values that follow from the configuration and the number of ranks."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_train.config.build import to_dict

if TYPE_CHECKING:
    from zaya_train.config.schema import ParallelConfig, PhaseConfig, TrainConfig


@dataclass(frozen=True)
class Layout:
    """Degrees of one phase on a given number of ranks; replicate x shard x context = world."""

    replicate: int
    shard: int
    """Data-parallel ranks inside an FSDP group; the group holds shard x context ranks."""
    context: int

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        return self.data * self.context


def context_degree(phase: PhaseConfig, parallel: ParallelConfig) -> int:
    """The phase's context-parallel degree after the launch's limit."""
    limit = parallel.context_parallel_limit
    return min(phase.context_parallel, limit) if limit else phase.context_parallel


def layout(phase: PhaseConfig, parallel: ParallelConfig, world: int) -> Layout:
    """Degrees of `phase` on `world` ranks; valid only where `check` passes."""
    context = context_degree(phase, parallel)
    group = parallel.shard or world
    return Layout(replicate=world // group, shard=group // context, context=context)


def sequences_per_step(phase: PhaseConfig) -> int:
    """Rows of a full global batch."""
    return phase.global_batch_tokens // phase.context_tokens


def phase_sequences(phase: PhaseConfig) -> int:
    """Rows a phase consumes, its tokens rounded up to whole rows."""
    return math.ceil(phase.tokens / phase.context_tokens)


def config_hash(config: TrainConfig) -> str:
    """Short sha256 of the whole configuration."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
