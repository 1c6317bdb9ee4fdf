"""The rows of a phase by global sample index, and the validation rows beside them.

`PhaseStream.row` is a pure function of the configuration, the rows that earlier phases consumed and
the index: any rank may ask for any row, in any order, before or after any restart, and get the same
one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import DataError
from zaya_train.data.check import require_same_tokenizer
from zaya_train.data.corpus import Corpus
from zaya_train.data.mixture import make_schedule
from zaya_train.data.prefetch import Prefetcher, prefetch
from zaya_train.data.row_plan import PlanSpec
from zaya_train.data.rows import Row, fingerprint
from zaya_train.data.source import Past, PlanReport, RowSource, SourceRequest, open_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from zaya_train.config.schema import DataConfig, PhaseConfig, SourceConfig
    from zaya_train.data.row_plan import Pieces

__all__ = [
    "PastPhase",
    "PhaseStream",
    "PlanReport",
    "Prefetcher",
    "Row",
    "prefetch",
    "validation_rows",
]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PastPhase:
    """An earlier phase and the rows it really consumed."""

    name: str
    phase: PhaseConfig
    rows: int


def past_phases(phases: Mapping[str, PhaseConfig], rows: Sequence[int]) -> list[PastPhase]:
    """The first phases of a plan with the rows that each consumed."""
    behind = list(phases.items())[: len(rows)]
    return [
        PastPhase(name, phase, consumed)
        for (name, phase), consumed in zip(behind, rows, strict=True)
    ]


class PhaseStream:
    """Training rows of one phase.

    Mixture weights are shares of rows, each row being `context_tokens` long: at every index each
    source is less than one row away from its exact share. A source goes on where earlier phases
    left it, whatever their mixtures and contexts, and is drawn in a new permutation every epoch.

    Raises:
        DataError: a mixture name without a source, corpora of different tokenizers, a damaged
            corpus, or a source of which no row can be made at this context.
    """

    def __init__(
        self,
        data: DataConfig,
        phase_name: str,
        phase: PhaseConfig,
        seed: int,
        past: Sequence[PastPhase] = (),
    ) -> None:
        unknown = sorted(set(phase.mixture) - set(data.sources))
        if unknown:
            raise DataError(
                f"plan.phases.{phase_name}.mixture: no source named {', '.join(unknown)}; "
                f"data.sources has {', '.join(sorted(data.sources))}"
            )
        self._seed = seed
        self._schedule = make_schedule(phase.mixture, seed, phase_name)
        corpora = _open_all({name: data.sources[name] for name in self._schedule.names})
        drawn = _past_draws(past, seed)
        spec = PlanSpec(
            row_tokens=phase.context_tokens,
            max_documents=data.max_documents_per_row,
            loss_on=phase.loss_on,
            balance_rows=data.balance_rows,
        )
        self._sources = {
            name: open_source(
                corpus,
                SourceRequest(
                    name=name,
                    seed=seed,
                    spec=spec,
                    max_documents=data.sources[name].max_documents,
                    plan_dir=data.plan_dir,
                    past=drawn.get(name, Past()),
                ),
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

    def locate(self, index: int) -> tuple[str, int]:
        """Source of global sample `index`, and which draw of this phase from it it is."""
        return self._schedule.locate(index)

    def row(self, index: int) -> Row:
        """Row of global sample `index`, from 0 without end; epochs follow one another."""
        name, draw = self.locate(index)
        row = self._sources[name].row(draw)
        return replace(row, fingerprint=fingerprint(index, row))

    def pieces(self, index: int) -> tuple[str, Pieces]:
        """Source of global sample `index` and what stands in its row, without reading tokens."""
        name, draw = self.locate(index)
        return name, self._sources[name].pieces(draw)

    def by_work(self, first: int, stop: int) -> list[int]:
        """Global samples first to stop - 1, those with the most attention work first.

        Ranks that take neighbours of this list, one each, finish together.
        """
        work = {}
        for index in range(first, stop):
            name, draw = self.locate(index)
            work[index] = self._sources[name].work(draw)
        return sorted(work, key=lambda index: (-work[index], index))

    def drawn(self, index: int) -> dict[str, int]:
        """Rows of every source among global samples 0 to index - 1."""
        return self._schedule.counts(index)

    def epochs(self, index: int) -> dict[str, float]:
        """`drawn` in passes over each source's rows at this context."""
        return {name: self._sources[name].epochs(n) for name, n in self.drawn(index).items()}

    def describe(self) -> dict[str, Any]:
        """Everything the rows follow from, as plain JSON values."""
        return {
            "seed": self._seed,
            "row_tokens": self.row_tokens,
            "mixture": dict(zip(self._schedule.names, self._schedule.shares, strict=True)),
            "sources": {name: source.describe() for name, source in self._sources.items()},
        }

    @property
    def sources(self) -> Mapping[str, RowSource]:
        """The sources of the mixture by name."""
        return self._sources

    @property
    def reports(self) -> dict[str, PlanReport]:
        """What planning did to each source."""
        return {name: source.report for name, source in self._sources.items()}


def _past_draws(past: Sequence[PastPhase], seed: int) -> dict[str, Past]:
    """Rows that earlier phases drew from every source."""
    draws: dict[str, Past] = {}
    for earlier in past:
        schedule = make_schedule(earlier.phase.mixture, seed, earlier.name)
        phase = earlier.phase
        for name, count in schedule.counts(earlier.rows).items():
            before = draws.get(name, Past())
            draws[name] = before.then(phase.context_tokens, phase.loss_on, count)
    return draws


def validation_rows(data: DataConfig, phase_name: str, context_tokens: int) -> dict[str, list[Row]]:
    """The first `data.validation_sequences` rows of every validation corpus, in a fixed order.

    The order depends on the corpus and the context only, so that losses compare over a whole run
    and between runs. A corpus with fewer rows gives all it has. That these corpora and the training
    ones share a tokenizer is `check_corpora`'s to say, which knows what the plan draws from.

    Raises:
        DataError: as PhaseStream; `phase_name` is named in it.
    """
    rows: dict[str, list[Row]] = {}
    spec = PlanSpec(row_tokens=context_tokens, max_documents=data.max_documents_per_row)
    for name, corpus in _open_all(data.validation).items():
        request = SourceRequest(name=name, seed=0, spec=spec, plan_dir=data.plan_dir)
        try:
            source = open_source(corpus, request)
        except DataError as error:
            raise DataError(f"phase {phase_name}: validation {error}") from error
        count = min(data.validation_sequences, len(source.plan))
        rows[name] = [source.row(draw) for draw in range(count)]
    return rows


def _open_all(sources: Mapping[str, SourceConfig]) -> dict[str, Corpus]:
    """Corpora by name, all of one tokenizer."""
    corpora = {name: Corpus.open(sources[name].path) for name in sorted(sources)}
    require_same_tokenizer(corpora)
    return corpora


def _log_plan(phase_name: str, source: RowSource) -> None:
    report = source.report
    _LOG.info(
        "phase %s, source %s: %d rows of %d, %.2f %% full, %.0f targets a row; documents whole %d, "
        "tail cut %d, earlier reasoning dropped %d, rejected %d, without target %d; %d rows left "
        "by earlier phases",
        phase_name,
        source.name,
        report.rows,
        report.row_tokens,
        100 * report.utilisation,
        report.supervised_tokens / report.rows,
        report.whole,
        report.tail_cut,
        report.earlier_dropped,
        report.rejected,
        report.unsupervised,
        report.carried_rows,
    )
