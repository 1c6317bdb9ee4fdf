"""Memory and traffic of every shipped recipe and phase, rehearsed.

    PYTHONPATH=.:kernels python -m tests.helpers.rehearsal_table

records them in tests/golden/rehearsal.json and prints the tables of docs/memory.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_train.main import compose
from zaya_train.planning.components import COMPONENTS
from zaya_train.tools.rehearsal import Rehearsal, rehearse_phases

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GOLDEN = Path(__file__).parents[1] / "golden" / "rehearsal.json"
LAUNCHES: dict[str, tuple[tuple[str, ...], int]] = {
    "zaya1_8b": (("recipe=zaya1_8b",), 1024),
    "zaya1_8b, one node": (("recipe=zaya1_8b",), 8),
    "zaya1_8b, selective": (("recipe=zaya1_8b", "parallel.recompute=selective"), 1024),
    "zaya1_8b, full": (("recipe=zaya1_8b", "parallel.recompute=full"), 1024),
    "zaya1_8b_1gpu": (("recipe=zaya1_8b_1gpu",), 1),
    "zaya1_300m": (("recipe=zaya1_300m",), 1),
    "smoke_cpu": (("recipe=smoke_cpu",), 2),
}
"""Name -> overrides, ranks."""
GB, MB = 10**9, 10**6


def measured(name: str, phases: Sequence[str] = ()) -> dict[str, Rehearsal]:
    """The given phases of a launch, or all."""
    overrides, ranks = LAUNCHES[name]
    config = compose(overrides)
    return rehearse_phases(config, ranks, phases or list(config.plan.phases))


def plain(rehearsal: Rehearsal) -> dict[str, Any]:
    """What is kept of a rehearsal."""
    return {
        "micro_batches": rehearsal.micro_batches,
        "local_tokens": rehearsal.local_tokens,
        "peak_bytes": {stage: peak.bytes for stage, peak in sorted(rehearsal.peaks.items())},
        "components": {
            name: rehearsal.peak.components[name]
            for name in COMPONENTS
            if rehearsal.peak.components.get(name, 0) > 0
        },
        "flows": {
            f"{kind} over {axis}": {"calls": flow.calls, "bytes": flow.bytes}
            for (kind, axis), flow in sorted(rehearsal.flows.items())
        },
    }


def memory_table(golden: Mapping[str, Any]) -> str:
    """Components at the peak, GB; phases of equal figures share a row."""
    columns = [
        c for c in COMPONENTS if any(_has(c, p) for ps in golden.values() for p in ps.values())
    ]
    lines = [
        f"| launch | phase | micro-batches x tokens | {' | '.join(columns)} | **peak** |",
        f"|---|---|---:|{'---:|' * len(columns)}---:|",
    ]
    for launch, phases in golden.items():
        groups: dict[str, list[str]] = {}
        for name, row in phases.items():
            parts = [f"{row['components'].get(c, 0) / GB:.2f}" for c in columns]
            peak = max(row["peak_bytes"].values()) / GB
            work = f"{row['micro_batches']} x {row['local_tokens']:,}"
            groups.setdefault(f"{work} | {' | '.join(parts)} | **{peak:.2f}** |", []).append(name)
        lines += [f"| {launch} | {', '.join(names)} | {rest}" for rest, names in groups.items()]
    return "\n".join(lines)


def _has(component: str, row: Mapping[str, Any]) -> bool:
    return bool(row["components"].get(component, 0) >= GB / 100)


def traffic_table(phases: Mapping[str, Any]) -> str:
    """What rank 0 hands to collectives per step, MB, of a launch's phases."""
    keys = sorted({key for row in phases.values() for key in row["flows"]})
    lines = [
        f"| collective | {' | '.join(phases)} |",
        f"|---|{'---:|' * len(phases)}",
    ]
    for key in keys:
        cells = [row["flows"].get(key, {"bytes": 0})["bytes"] / MB for row in phases.values()]
        if max(cells) >= 0.01:
            lines.append(f"| {key} | {' | '.join(f'{cell:,.1f}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name in sys.argv[1:] or LAUNCHES:
        golden[name] = {phase: plain(r) for phase, r in measured(name).items()}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    print(memory_table(golden))
    print(traffic_table(golden["zaya1_8b"]))


if __name__ == "__main__":
    main()
