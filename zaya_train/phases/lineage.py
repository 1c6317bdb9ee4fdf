"""What a checkpoint's past was made of, and whether a configuration still describes it.

A resumed run continues exactly only if the seed, the phases behind it, the contents of their
corpora and the settings by which these are dealt into rows are what they were: the next phase works
out from them which documents are left. What lies ahead may be edited: phases added, lengthened or
changed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from zaya_train.config.derive import phase_sequences, sources_drawn
from zaya_train.config.diff import differences
from zaya_train.config.kinds import PHASES, nameable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from zaya_train.config.schema import PhaseConfig, TrainConfig

_MAY_CHANGE = {"micro_batch_sequences", "context_parallel", "tokens", "exit_gate"}
"""Of the phase under way: how a step is computed, where the phase ends and what that asks for."""


def lineage(config: TrainConfig, phase_index: int, corpora: Mapping[str, str]) -> dict[str, Any]:
    """The seed, the phases up to and including number `phase_index`, and the content hash of every
    source they draw from and the settings of its rows by key, as plain JSON values.

    corpora: content hash of each source by name, as `data.check.check_corpora` gives them.
    """
    phases = list(config.plan.phases.items())[: phase_index + 1]
    drawn = sources_drawn(phase for _, phase in phases)
    return {
        "seed": config.run.seed,
        "phases": [[name, asdict(phase)] for name, phase in phases],
        "corpora": {name: corpora[name] for name in drawn},
        "rows": _row_settings(config, drawn) if drawn else {},
    }


def _row_settings(config: TrainConfig, drawn: Iterable[str]) -> dict[str, int | None]:
    """Settings outside the phases that decide which documents stand in which row."""
    data = config.data
    settings: dict[str, int | None] = {
        "data.balance_rows": data.balance_rows,
        "data.max_documents_per_row": data.max_documents_per_row,
    }
    limits = {
        f"data.sources.{name}.max_documents": data.sources[name].max_documents for name in drawn
    }
    return settings | limits


def changes(
    before: dict[str, Any],
    config: TrainConfig,
    corpora: Mapping[str, str],
    named: Collection[str] = (),
) -> list[str]:
    """Keys of `config` that differ from a checkpoint's lineage, as `key: old -> new`, and sources
    whose corpora hold something else than they did.

    named: full keys that may differ all the same, of those that can be named (config.kinds).
    """
    now = lineage(config, len(before["phases"]) - 1, corpora)
    # A source that is no longer drawn from shows as a change of a mixture.
    found = [
        f"data.sources.{name}: its corpus ({config.data.sources[name].path}) has changed, content "
        f"sha256 {old} -> {now['corpora'][name]}"
        for name, old in before["corpora"].items()
        if now["corpora"].get(name, old) != old
    ]
    # Checkpoints written before these were recorded have none to compare.
    found += [
        f"{key}: {old} -> {now['rows'][key]}"
        for key, old in before.get("rows", {}).items()
        if now["rows"].get(key, old) != old
    ]
    if before["seed"] != now["seed"]:
        found.append(f"run.seed: {before['seed']} -> {now['seed']}")
    for number, (name, old) in enumerate(before["phases"]):
        if number >= len(now["phases"]) or now["phases"][number][0] != name:
            here = now["phases"][number][0] if number < len(now["phases"]) else "nothing"
            found.append(f"plan.phases: number {number + 1} was {name}, now {here}")
            break
        allowed = _MAY_CHANGE if number == len(before["phases"]) - 1 else _MAY_CHANGE - {"tokens"}
        new = {k: v for k, v in now["phases"][number][1].items() if k not in allowed}
        pairs = differences({k: old.get(k) for k in new}, new, f"{PHASES}.{name}")
        found += [
            f"{key}: {there} -> {here}"
            for key, (there, here) in pairs.items()
            if not (key in named and nameable(key))
        ]
    return found


def lengthened(past_rows: Sequence[int], phases: Mapping[str, PhaseConfig]) -> list[str]:
    """Phases that are over and of which the configuration now asks for more.

    past_rows: rows consumed by each phase that is over.
    """
    return [
        f"plan.phases.{name}.tokens: {phase.tokens} asks for {phase_sequences(phase)} rows and the "
        f"phase ended after {rows}; a new phase behind it can go on"
        for rows, (name, phase) in zip(past_rows, phases.items(), strict=False)
        if phase_sequences(phase) > rows
    ]
