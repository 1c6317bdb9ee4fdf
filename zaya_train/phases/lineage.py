"""What a checkpoint's past was made of, and whether a configuration still describes it.

A resumed run continues exactly only if the seed and the phases behind it are what they were. What
lies ahead may be edited: phases added, lengthened or changed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig

_MAY_CHANGE = {"micro_batch_sequences", "context_parallel", "tokens"}
"""Of the phase under way: how a step is computed, and where the phase ends."""


def lineage(config: TrainConfig, phase_index: int) -> dict[str, Any]:
    """The seed and the phases up to and including number `phase_index`, as plain JSON values."""
    phases = list(config.plan.phases.items())[: phase_index + 1]
    return {"seed": config.run.seed, "phases": [[name, asdict(phase)] for name, phase in phases]}


def changes(before: dict[str, Any], config: TrainConfig) -> list[str]:
    """Keys of `config` that differ from a checkpoint's lineage, as `key: old -> new`."""
    now = lineage(config, len(before["phases"]) - 1)
    found = []
    if before["seed"] != now["seed"]:
        found.append(f"run.seed: {before['seed']} -> {now['seed']}")
    for number, (name, old) in enumerate(before["phases"]):
        if number >= len(now["phases"]) or now["phases"][number][0] != name:
            here = now["phases"][number][0] if number < len(now["phases"]) else "nothing"
            found.append(f"plan.phases: number {number + 1} was {name}, now {here}")
            break
        new = now["phases"][number][1]
        allowed = _MAY_CHANGE if number == len(before["phases"]) - 1 else _MAY_CHANGE - {"tokens"}
        found += [
            f"plan.phases.{name}.{key}: {old.get(key)} -> {new[key]}"
            for key in new
            if key not in allowed and old.get(key) != new[key]
        ]
    return found
