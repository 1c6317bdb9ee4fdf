"""How much of its plan a run had behind it when it wrote the checkpoint that is exported."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.train.manifest import CheckpointRecord


def progress(record: CheckpointRecord) -> dict[str, Any]:
    """For a receipt: `finished`, null where nothing tells; `phase_share`, 0 to 1, of the rows
    of its phase that were consumed; `phases_not_begun`, names of the plan's others.

    A manifest's keys are sorted, so the plan's order is known of phases that have begun alone.
    """
    plan: Mapping[str, Any] = record.identity.get("config", {}).get("plan", {}).get("phases", {})
    begun = dict(record.lineage.get("phases", []))
    if record.phase_name not in plan:
        return {"finished": None, "phase_share": None, "phases_not_begun": []}
    share = _share(record, plan[record.phase_name], record.phase_name in begun)
    left = sorted(plan.keys() - begun.keys() - {record.phase_name})
    return {"finished": share >= 1 and not left, "phase_share": share, "phases_not_begun": left}


def _share(record: CheckpointRecord, phase: Mapping[str, Any], begun: bool) -> float:
    rows = record.train_state["phase_rows"]
    if not rows:
        # At a phase's end the cursor stands at the next one's beginning.
        return float(begun)
    return min(1.0, rows / math.ceil(phase["tokens"] / phase["context_tokens"]))


def unfinished_line(receipt: Mapping[str, Any]) -> str:
    """What was still to be trained, in one line; empty where nothing was, or nobody knows."""
    run = receipt["run"]
    if run["finished"] in (None, True):
        return ""
    # 99.99% are not all.
    done = math.floor(1000 * run["phase_share"]) / 10
    left = run["phases_not_begun"]
    return f"UNFINISHED: the run's plan was not done: {done:g}% of phase {run['phase']}" + (
        f", nothing of {', '.join(left)}" if left else ""
    )
