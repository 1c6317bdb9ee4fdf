"""What passes from one phase to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from zaya_train.config.schema import PhaseConfig


@dataclass(frozen=True)
class Carried:
    """One row of an edge's carry-over table."""

    item: str
    fate: Literal["kept", "reset", "changed"]
    detail: str = ""


def carry_over(before: PhaseConfig, after: PhaseConfig) -> list[Carried]:
    """The carry-over table of the edge between two phases.

    What is kept lies in the phase-end checkpoint, which the next phase loads; what is reset is a
    function of the phase's own counters, which start at zero.
    """
    rows = [
        Carried("weights", "kept"),
        Carried("Muon momentum", "kept"),
        Carried("AdamW moments and step count", "kept"),
        Carried("balancing biases, their moments and step count", "kept"),
        Carried("learning-rate schedule", "reset", after.schedule.kind),
        Carried("data cursor", "reset", "each phase draws its own order from the seed"),
    ]
    for item, old, new in (
        ("RoPE base", before.rope_base, after.rope_base),
        ("context tokens", before.context_tokens, after.context_tokens),
        ("context parallel", before.context_parallel, after.context_parallel),
        ("global batch tokens", before.global_batch_tokens, after.global_batch_tokens),
        ("mixture", dict(before.mixture), dict(after.mixture)),
        ("learning-rate scale", before.learning_rate_scale, after.learning_rate_scale),
    ):
        same = old == new
        rows.append(Carried(item, "kept" if same else "changed", "" if same else f"{old} -> {new}"))
    return rows
