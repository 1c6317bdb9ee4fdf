"""What passes from one phase to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zaya_train.phases.gates import conditions

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
        Carried("sources", "kept", "each goes on where earlier phases left it"),
        Carried("random numbers", "kept", "none: order and initialisation follow from the seed"),
        Carried("learning-rate schedule", "reset", after.schedule.kind),
        Carried("data cursor", "reset", "each phase draws its own order from the seed"),
        Carried("guard's window and rows to avoid", "reset", "norms depend on batch and context"),
    ]
    for item, old, new in (
        ("RoPE base", before.rope_base, after.rope_base),
        ("context tokens", before.context_tokens, after.context_tokens),
        ("context parallel", before.context_parallel, after.context_parallel),
        ("global batch tokens", before.global_batch_tokens, after.global_batch_tokens),
        ("micro-batch rows", before.micro_batch_sequences, after.micro_batch_sequences),
        ("mixture", dict(before.mixture), dict(after.mixture)),
        ("loss on", before.loss_on, after.loss_on),
        ("learning-rate scale", before.learning_rate_scale, after.learning_rate_scale),
    ):
        same = old == new
        rows.append(Carried(item, "kept" if same else "changed", "" if same else f"{old} -> {new}"))
    return rows


def entry_checks(before_name: str, before: PhaseConfig, name: str) -> list[str]:
    """What must hold before phase `name` begins, in words; `train.entry` and `config.check` are
    where it is tested."""
    gate = conditions(before.exit_gate)
    return [
        f"a checkpoint of the end of {before_name} that verifies, of this model",
        f"the seed, the phases up to {before_name} and the contents of their corpora are what they "
        "were",
        f"{before_name} ended with {' and '.join(gate)}" if gate else f"{before_name} has no gate",
        f"{name}'s corpora hold enough rows for data.sources.*.max_epochs",
    ]
