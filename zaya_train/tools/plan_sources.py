"""`zaya plan`: how often a plan reads the corpora that are there, by their tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_train.config.errors import DataError
from zaya_train.data.corpus import MANIFEST, read_manifest
from zaya_train.data.survey import MANY_PASSES

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig


def source_lines(config: TrainConfig) -> list[str]:
    """In lines: passes over each source, those with too many, those that are not on this machine.

    An estimate from token counts alone: of the passes that `data.survey` counts when a run starts,
    padding makes fewer, cut tails and `max_documents` more.
    """
    planned: Counter[str] = Counter()
    for phase in config.plan.phases.values():
        whole = sum(phase.mixture.values())
        for name, weight in phase.mixture.items():
            planned[name] += int(phase.tokens * weight / whole)
    paths = {name: Path(config.data.sources[name].path) for name in sorted(planned)}
    here = {name: tokens for name, path in paths.items() if (tokens := _tokens(path))}
    passes = {name: planned[name] / tokens for name, tokens in here.items()}
    lines = []
    if passes:
        said = ", ".join(f"{name} {made:,.2f}" for name, made in passes.items())
        lines.append(f"passes over each source, by tokens: {said}")
    for name, made in passes.items():
        if made > MANY_PASSES:
            lines.append(
                f"warning: source {name} is read {made:,.1f} times; beyond {MANY_PASSES:g} repeats "
                "teach less and less"
            )
    if absent := [f"{name} ({path})" for name, path in paths.items() if name not in here]:
        lines.append(f"sources without a readable corpus on this machine: {', '.join(absent)}")
    return lines


def _tokens(corpus: Path) -> int:
    """0 where no corpus is, or none that can be read: `train` says what is wrong with it."""
    if not (corpus / MANIFEST).is_file():
        return 0
    try:
        return read_manifest(corpus).tokens
    except DataError:
        return 0
