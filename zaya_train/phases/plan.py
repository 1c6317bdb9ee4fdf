"""Batch sizes, steps and learning rates of a phase as pure functions of what it has consumed.

Counting is in rows (sequences of a phase's context length), so every position is an exact integer;
where a run stands is its TrainState's phase and rows (docs/decisions/0006).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from zaya_train.config.derive import phase_sequences, sequences_per_step

if TYPE_CHECKING:
    from zaya_train.config.schema import PhaseConfig, ScheduleConfig


def batch_sequences(phase: PhaseConfig, consumed: int, unit: int) -> int:
    """Rows of the step that starts after `consumed` rows of the phase.

    With a ramp the batch grows linearly in whole multiples of `unit` (rows of one micro-batch over
    all data ranks). The last step takes what is left, rounded up to `unit` so that all ranks work.
    """
    full = sequences_per_step(phase)
    ramp = phase.batch_ramp
    size = full
    if ramp is not None:
        start = ramp.start_tokens // phase.context_tokens
        share = min(1.0, consumed * phase.context_tokens / ramp.over_tokens)
        size = min(full, unit * math.floor((start + share * (full - start)) / unit))
    left = phase_sequences(phase) - consumed
    return min(size, unit * math.ceil(left / unit))


def steps_in(phase: PhaseConfig, unit: int) -> int:
    """Optimizer steps of a whole phase; see `batch_sequences` for `unit`."""
    consumed = steps = 0
    if phase.batch_ramp is None:
        return math.ceil(phase_sequences(phase) / sequences_per_step(phase))
    while consumed < phase_sequences(phase):
        consumed += batch_sequences(phase, consumed, unit)
        steps += 1
    return steps


def schedule_factor(schedule: ScheduleConfig, tokens: int, total_tokens: int) -> float:
    """Learning rate over its peak after `tokens` of a phase's `total_tokens`; at least final_ratio
    once warm-up is over. Warm-up starts one step above zero because it looks at consumed tokens
    including the coming step's (see `train.step`)."""
    warmup = schedule.warmup_tokens
    if tokens < warmup:
        return tokens / warmup
    floor = schedule.final_ratio
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        start, length = total_tokens - schedule.decay_tokens, schedule.decay_tokens
    else:
        start, length = warmup, total_tokens - warmup
    if tokens <= start or length == 0:
        return 1.0
    progress = min(1.0, (tokens - start) / length)
    if schedule.kind == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - (1 - floor) * progress
