"""Exit gates: what a phase must have reached before anything behind it begins.

What a phase ended with is written into its last checkpoint; the gate is judged when the run goes on
from there, so a run that lived on and one that was started again are judged alike.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.config.schema import GateConfig


WITHOUT_STEP = "without_step"
"""In the measurements of a phase that was shortened to end at an existing checkpoint: the process
that ended it made no step of it, so its load was not seen."""


def missed(gate: GateConfig, measured: Mapping[str, Any]) -> list[str]:
    """Conditions of a gate that a phase's last measurements do not meet, one line each.

    measured: `validation_loss` by name, `skip_rate`, `load_entropy`; what is missing, as after a
    phase that began before gates were known, does not meet a condition about it. WITHOUT_STEP: the
    conditions about the load are not judged; nothing could ever meet them.
    """
    losses = measured.get("validation_loss", {})
    found = [
        f"validation_loss.{name}: {losses.get(name, 'not measured')}, at most {limit}"
        for name, limit in gate.validation_loss.items()
        if not _number(losses.get(name)) <= limit
    ]
    if measured.get(WITHOUT_STEP):
        return found
    skip, entropy = measured.get("skip_rate"), measured.get("load_entropy")
    if gate.most_skip_rate is not None and not _number(skip) <= gate.most_skip_rate:
        found.append(f"most_skip_rate: {_shown(skip)}, at most {gate.most_skip_rate}")
    if gate.least_load_entropy is not None and not _number(entropy) >= gate.least_load_entropy:
        found.append(f"least_load_entropy: {_shown(entropy)}, at least {gate.least_load_entropy}")
    return found


def conditions(gate: GateConfig) -> list[str]:
    """A gate in words."""
    found = [f"validation loss of {n} <= {limit}" for n, limit in gate.validation_loss.items()]
    if gate.most_skip_rate is not None:
        found.append(f"skip rate <= {gate.most_skip_rate}")
    if gate.least_load_entropy is not None:
        found.append(f"load entropy >= {gate.least_load_entropy}")
    return found


def _number(value: float | None) -> float:
    """NaN, which compares with nothing, for what was not measured."""
    return math.nan if value is None else value


def _shown(value: float | None) -> str:
    return "not measured" if value is None else str(value)
