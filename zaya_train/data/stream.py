"""The rows of a phase by global sample index, and the validation rows beside them.

`PhaseStream.row` is a pure function of the configuration and the index: any rank may ask for any
row, in any order, before or after any restart, and get the same one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from zaya_train.config.errors import DataError
from zaya_train.data.check import require_same_tokenizer
from zaya_train.data.corpus import Corpus
from zaya_train.data.mixture import make_schedule
from zaya_train.data.order import permuted, shuffled_row
from zaya_train.data.prefetch import Prefetcher, prefetch
from zaya_train.data.rows import IGNORED_LABEL, PlanReport, Row, RowSource, plan_rows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zaya_train.config.schema import DataConfig, PhaseConfig, SourceConfig

__all__ = [
    "IGNORED_LABEL",
    "PhaseStream",
    "PlanReport",
    "Prefetcher",
    "Row",
    "prefetch",
    "validation_rows",
]

_LOG = logging.getLogger(__name__)


class PhaseStream:
    """Training rows of one phase.

    Mixture weights are shares of rows, each row being `context_tokens` long: at every index each
    source is less than one row away from its exact share. A source's rows are planned once per
    phase and drawn in a new permutation every epoch.

    Raises:
        DataError: a mixture name without a source, corpora of different tokenizers, a damaged
            corpus, or a source of which no row can be made at this context.
    """

    def __init__(self, data: DataConfig, phase_name: str, phase: PhaseConfig, seed: int) -> None:
        unknown = sorted(set(phase.mixture) - set(data.sources))
        if unknown:
            raise DataError(
                f"plan.phases.{phase_name}.mixture: no source named {', '.join(unknown)}; "
                f"data.sources has {', '.join(sorted(data.sources))}"
            )
        self._order = (seed, phase_name)
        self._schedule = make_schedule(phase.mixture, *self._order)
        corpora = _open_all({name: data.sources[name] for name in self._schedule.names})
        self._sources = {
            name: plan_rows(
                name,
                corpus,
                phase.context_tokens,
                data.max_documents_per_row,
                (*self._order, name),
            )
            for name, corpus in corpora.items()
        }
        first = next(iter(self._sources.values()))
        self.row_tokens: int = phase.context_tokens
        self.vocab_size: int = first.corpus.manifest.vocab_size
        self.pad_id: int = first.corpus.manifest.pad_id
        self.tokenizer_path: Path = first.corpus.tokenizer_path
        for source in self._sources.values():
            _log_plan(phase_name, source)

    def row(self, index: int) -> Row:
        """Row of global sample `index`, from 0 without end; epochs follow one another."""
        name, ordinal = self._schedule.locate(index)
        source = self._sources[name]
        return source.row(shuffled_row(ordinal, len(source), *self._order, name))

    def drawn(self, index: int) -> dict[str, int]:
        """Rows of every source among global samples 0 to index - 1."""
        return self._schedule.counts(index)

    def epochs(self, index: int) -> dict[str, float]:
        """`drawn` in passes over each source's rows."""
        return {name: count / len(self._sources[name]) for name, count in self.drawn(index).items()}

    @property
    def reports(self) -> dict[str, PlanReport]:
        """What planning did to each source."""
        return {name: source.report for name, source in self._sources.items()}


def validation_rows(data: DataConfig, phase_name: str, context_tokens: int) -> dict[str, list[Row]]:
    """The first `data.validation_sequences` rows of every validation corpus, in a fixed order.

    The order depends on the corpus and the context only, so that losses compare over a whole run
    and between runs. A corpus with fewer rows gives all it has. That these corpora and the training
    ones share a tokenizer is `check_corpora`'s to say, which knows what the plan draws from.

    Raises:
        DataError: as PhaseStream; `phase_name` is named in it.
    """
    rows: dict[str, list[Row]] = {}
    for name, corpus in _open_all(data.validation).items():
        order = ("validation", name)
        try:
            source = plan_rows(name, corpus, context_tokens, data.max_documents_per_row, order)
        except DataError as error:
            raise DataError(f"phase {phase_name}: validation {error}") from error
        count = min(data.validation_sequences, len(source))
        rows[name] = [source.row(permuted(i, len(source), *order)) for i in range(count)]
    return rows


def _open_all(sources: Mapping[str, SourceConfig]) -> dict[str, Corpus]:
    """Corpora by name, all of one tokenizer."""
    corpora = {name: Corpus.open(sources[name].path) for name in sorted(sources)}
    require_same_tokenizer(corpora)
    return corpora


def _log_plan(phase_name: str, source: RowSource) -> None:
    report = source.report
    _LOG.info(
        "phase %s, source %s: %d rows of %d, %.2f %% full; documents whole %d, tail cut %d, "
        "earlier reasoning dropped %d, rejected %d",
        phase_name,
        source.name,
        report.rows,
        report.row_tokens,
        100 * report.utilisation,
        report.whole,
        report.tail_cut,
        report.earlier_dropped,
        report.rejected,
    )
