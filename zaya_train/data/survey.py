"""The rows of a whole plan, made or found before anything starts.

A phase weeks into a run must not be the first to find that no document fits its context, or that a
source has run dry.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from zaya_train.config.derive import phase_sequences
from zaya_train.config.errors import ConfigError
from zaya_train.data.stream import PhaseStream, past_phases

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.config.schema import TrainConfig


_LOG = logging.getLogger(__name__)

MANY_PASSES = 4.0
"""Up to so many, repeated tokens teach nearly what new ones would (arXiv 2305.16264, section 5)."""


def survey(config: TrainConfig) -> dict[str, float]:
    """Plan every phase; returns the passes over each source that the whole plan makes.

    Raises:
        ConfigError: more passes than a source's max_epochs, or a setting that cannot be.
        DataError: a source of which no row can be made at some phase's context.
    """
    _check_settings(config)
    passes: Counter[str] = Counter()
    rows: list[int] = []
    for name, phase in config.plan.phases.items():
        past = past_phases(config.plan.phases, rows)
        stream = PhaseStream(config.data, name, phase, config.run.seed, past)
        rows.append(phase_sequences(phase))
        passes.update(stream.epochs(rows[-1]))
    for name, made in sorted(passes.items()):
        most = config.data.sources[name].max_epochs
        if most is not None and made > most:
            raise ConfigError(
                f"data.sources.{name}.max_epochs: the plan makes {made:.3f} passes over it, "
                f"at most {most} are allowed; lower its weights or the phases' tokens"
            )
    return dict(passes)


def say_passes(passes: Mapping[str, float]) -> None:
    """Passes of the whole plan over each source into the log; a warning for what is too small."""
    listed = ", ".join(f"{name} {made:,.2f}" for name, made in sorted(passes.items()))
    _LOG.info("passes over each source in the whole plan: %s", listed)
    for name, made in sorted(passes.items()):
        if made > MANY_PASSES:
            _LOG.warning(
                "source %s is too small for this plan: %s passes over it, and beyond %g repeats "
                "teach less and less; data.sources.%s.max_epochs=%g would refuse",
                name, f"{made:,.1f}", MANY_PASSES, name, MANY_PASSES,
            )  # fmt: skip


def _check_settings(config: TrainConfig) -> None:
    for key, value in (
        ("data.balance_rows", config.data.balance_rows),
        ("data.max_documents_per_row", config.data.max_documents_per_row),
        *((f"data.sources.{n}.max_epochs", s.max_epochs) for n, s in config.data.sources.items()),
        *(
            (f"data.sources.{n}.max_documents", s.max_documents)
            for n, s in config.data.sources.items()
        ),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"{key}: {value} must be positive")
