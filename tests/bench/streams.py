"""Rows of one corpus by itself, for those who time or weigh them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from zaya_train.data.stream import PhaseStream

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = "s"


def stream_of(corpus: Path, row_tokens: int, plan_dir: str | None = None) -> PhaseStream:
    """A phase that draws from `corpus`, named SOURCE, alone."""
    data = DataConfig(sources={SOURCE: SourceConfig(path=str(corpus))}, plan_dir=plan_dir)
    phase = PhaseConfig(
        tokens=row_tokens,
        context_tokens=row_tokens,
        rope_base=1e4,
        global_batch_tokens=row_tokens,
        mixture={SOURCE: 1.0},
    )
    return PhaseStream(data, "p", phase, 0)
