"""Values that follow from the configuration and the number of ranks."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zaya_train.config.build import to_dict
from zaya_train.config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from zaya_train.config.schema import ParallelConfig, PhaseConfig, TrainConfig


@dataclass(frozen=True)
class Layout:
    """Degrees of one phase on a given number of ranks; replicate x shard x context = world.

    `parallel.mesh` says what the axes mean.
    """

    replicate: int
    shard: int
    """Data-parallel ranks inside an FSDP group; the group holds shard x context ranks."""
    context: int
    expert: int = 1
    """Ranks of an FSDP group among which every layer's experts are divided."""

    @property
    def fsdp(self) -> int:
        """Ranks of an FSDP group, over which every tensor is sharded."""
        return self.shard * self.context

    @property
    def expert_shard(self) -> int:
        """Ranks that hold parts of the same experts."""
        return self.fsdp // self.expert

    def shared_axes(self, rank: int, other: int) -> list[str]:
        """Axes along which two ranks of the world are in one group."""
        same = {
            "replicate": rank % self.fsdp == other % self.fsdp,
            "fsdp": rank // self.fsdp == other // self.fsdp,
            "context": rank // self.context == other // self.context,
        }
        if self.expert > 1:
            same["expert_shard"] = same["fsdp"] and rank % self.expert == other % self.expert
            same["expert"] = rank // self.expert == other // self.expert
        return [axis for axis, shared in same.items() if shared]

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        return self.data * self.context


def context_degree(phase: PhaseConfig, parallel: ParallelConfig, world: int) -> int:
    """The phase's context-parallel degree on `world` ranks, lowered as the launch asks."""
    degree, limit = phase.context_parallel, parallel.context_parallel_limit
    if limit:
        degree = min(degree, limit)
    return math.gcd(degree, parallel.shard or world) if parallel.context_parallel_fit else degree


def layout(phase: PhaseConfig, parallel: ParallelConfig, world: int) -> Layout:
    """Degrees of `phase` on `world` ranks; valid only where `check` passes."""
    context = context_degree(phase, parallel, world)
    group = parallel.shard or world
    return Layout(
        replicate=world // group,
        shard=group // context,
        context=context,
        expert=parallel.expert_parallel,
    )


def layout_notes(config: TrainConfig, world: int) -> list[str]:
    """What works but wastes: said by `zaya plan` and in the log."""
    group, experts = config.parallel.shard or world, config.model.num_experts
    notes = []
    if group > experts:
        notes.append(
            f"parallel.shard: groups of {group} ranks shard {experts} experts, so gathering moves "
            f"padding ({group / experts:.0f} times the weights); a smaller parallel.shard is faster"
        )
    for name, phase in config.plan.phases.items():
        degree = context_degree(phase, config.parallel, world)
        if degree != phase.context_parallel:
            notes.append(
                f"phase {name}: context_parallel {phase.context_parallel} lowered to {degree} for "
                "this launch"
            )
    return notes


def launched_ranks(environment: Mapping[str, str]) -> int:
    """Ranks of this launch by its variables, 1 without them. ConfigError for no number."""
    value = environment.get("WORLD_SIZE", "1")
    if not value.isdecimal():
        raise ConfigError(f"launch environment: WORLD_SIZE={value!r} is not an integer")
    return int(value)


def sequences_per_step(phase: PhaseConfig) -> int:
    """Rows of a full global batch."""
    return phase.global_batch_tokens // phase.context_tokens


def phase_sequences(phase: PhaseConfig) -> int:
    """Rows a phase consumes, its tokens rounded up to whole rows."""
    return math.ceil(phase.tokens / phase.context_tokens)


def sources_drawn(phases: Iterable[PhaseConfig]) -> list[str]:
    """Names of the sources that at least one of `phases` draws from, sorted."""
    return sorted({n for phase in phases for n, weight in phase.mixture.items() if weight > 0})


def config_hash(config: TrainConfig) -> str:
    """Short sha256 of the whole configuration."""
    return hash_of(to_dict(config))


def hash_of(values: Mapping[str, Any]) -> str:
    """`config_hash` of a configuration as plain dictionaries, also after JSON."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
