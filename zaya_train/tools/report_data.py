"""What a report shows of one run: its metrics, thinned for drawing, and its evaluations."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zaya_train.config.errors import DataError
from zaya_train.runtime.files import INCIDENTS_FILE
from zaya_train.train.attempts import CONFIG_FILE, read_config
from zaya_train.train.metrics import (
    METRICS_FILE,
    ROW_FIELDS,
    current_rows,
    decode_floats,
    is_launch,
    iter_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MANY = 4
"""More runs than this on a page are drawn with fewer points each."""
MAX_MATRIX_ROWS = 1_000  # 40 layers x 17 classes are 22 KB a row as Python floats
MATRICES = ("load", "balancing_bias", "stream_rms", "eda_gain")
TAIL_ROWS = 20  # a phase's final loss is the mean over at most this many of its last rows

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """Exact matches among the answers to `total` problems."""

    total: int
    correct: int

    @property
    def share(self) -> float:
        """Correct over total, 0 to 1."""
        return self.correct / self.total


@dataclass(frozen=True)
class Answer:
    """One sampled reply; `reply` holds the reasoning too."""

    prompt: str
    reply: str
    expected: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """One file below `<run_dir>/evaluation`, as `tools/evaluate.py` writes it."""

    name: str
    overall: Score
    by_family: dict[str, Score]
    answers: list[Answer]


@dataclass(frozen=True)
class PhaseSpan:
    """One phase, from the end of the one before."""

    name: str
    first_step: int
    last_step: int
    tokens: int
    """Consumed in this phase; up to the last logged step where its end was not recorded."""
    final_loss: float
    """Mean over the last rows, at most TAIL_ROWS; NaN rows left out."""
    validation: dict[str, float]
    """Last loss of each held-out corpus in this phase."""
    step_seconds: float
    """Median."""
    tokens_per_second: float
    """Median."""


@dataclass(frozen=True)
class Spent:
    """Where a run's wall time went."""

    wall_seconds: float
    """From the first row to the newest."""
    standing_seconds: float
    """In steps that stand after all roll backs, waiting for data included."""
    data_seconds: float
    """Of these, waiting for data."""
    redone_seconds: float
    """In steps that a restart or a roll back undid."""
    saving_seconds: float
    """Training held up by checkpoints."""
    other_seconds: float
    """Start-up, evaluation and logging, between the first and the last row of each attempt."""
    between_seconds: float
    """From the last row of an attempt to the first of the next."""

    @property
    def goodput(self) -> float:
        """Share of the wall time in steps that stand, 0 to 1."""
        return self.standing_seconds / self.wall_seconds if self.wall_seconds else 1.0


@dataclass(frozen=True)
class RunData:
    """Rows of one run that stand after all roll backs, in the order of steps."""

    name: str
    run_dir: Path
    launches: list[dict[str, Any]]
    """`start` and `resume` rows."""
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    phase_rows: list[dict[str, Any]]
    """`phase` rows."""
    save_failures: list[dict[str, Any]]
    incidents: list[dict[str, Any]]
    """Records of incidents.jsonl."""
    unreadable_incidents: int
    """Lines of it that are none."""
    spent: Spent
    done: bool
    config: dict[str, Any]
    """Of the newest attempt; empty where the run kept none."""
    evaluations: list[Evaluation]

    @cached_property
    def step(self) -> Array:
        """Step numbers of `steps`."""
        return self.column("step")

    def column(self, key: str) -> Array:
        """One field of the step rows."""
        return np.array([row.get(key, np.nan) for row in self.steps], dtype=np.float64)

    @cached_property
    def validation(self) -> dict[str, tuple[Array, Array]]:
        """Held-out corpus -> (steps, losses)."""
        names = dict.fromkeys(name for row in self.evals for name in row["losses"])
        curves = {}
        for name in names:
            rows = [row for row in self.evals if name in row["losses"]]
            steps = np.array([row["step"] for row in rows], dtype=np.float64)
            curves[name] = (steps, np.array([row["losses"][name] for row in rows], np.float64))
        return curves

    def matrix(self, key: str) -> tuple[Array, Array]:
        """Steps [N] and values [N, ...] of one of MATRICES, of the rows that kept it; not of steps
        whose rows were passed over, which have no load and no stream."""
        rows = [row for row in self.steps if row.get(key) and not math.isnan(row["load_entropy"])]
        steps = np.array([row["step"] for row in rows], dtype=np.float64)
        return steps, np.array([row[key] for row in rows], dtype=np.float64)

    @cached_property
    def phases(self) -> list[PhaseSpan]:
        """The phases in the order they were trained."""
        groups = [list(group) for _, group in groupby(self.steps, key=lambda row: row["phase"])]
        spans: list[PhaseSpan] = []
        first = self.launches[0]["step"] if self.launches else self.steps[0]["step"] - 1
        tokens_before = 0
        for rows, following in zip_longest(groups, groups[1:]):
            stop = following[0]["step"] if following else math.inf
            spans.append(_phase_span(rows, self._beside(rows, first, stop), first, tokens_before))
            first = spans[-1].last_step
            tokens_before += spans[-1].tokens
        return spans

    def _beside(
        self, rows: list[dict[str, Any]], first_step: int, stop: float
    ) -> list[dict[str, Any]]:
        """`eval` and ending `phase` rows of the phase of `rows`, which began after `first_step` and
        ended before `stop`: they tell its end where that step was not logged."""
        name = rows[0]["phase"]
        ends = [row for row in self.phase_rows if row["name"] == name and row["event"] == "end"]
        own = [row for row in self.evals if row["phase"] == name]
        return [row for row in (*own, *ends) if first_step <= row["step"] < stop]


def load_run(run_dir: Path) -> RunData:
    """Read one run. Raises DataError naming the file that is missing, empty or malformed."""
    path = run_dir / METRICS_FILE
    clock = _Clock()
    rows = current_rows(_thin_matrices(clock.listen(iter_rows(path))))
    steps = [row for row in rows if row["kind"] == "step"]
    if not steps:
        raise DataError(f"{path}: holds no `step` row yet; nothing to draw")
    shapes = {tuple(len(layer) for layer in row["load"]) for row in steps if row.get("load")}
    if len(shapes) > 1 or any(len(set(shape)) != 1 for shape in shapes):
        raise DataError(f"{path}: `load` changes its shape (layers x classes) within the run")
    of_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ROW_FIELDS}
    config = run_dir / CONFIG_FILE
    incidents, unreadable = read_incidents(run_dir)
    return RunData(
        name=run_dir.resolve().name,
        run_dir=run_dir,
        launches=[row for row in rows if is_launch(row)],
        steps=steps,
        evals=of_kind["eval"],
        checkpoints=of_kind["checkpoint"],
        phase_rows=of_kind["phase"],
        save_failures=of_kind["save_failed"],
        incidents=incidents,
        unreadable_incidents=unreadable,
        spent=clock.spent(steps),
        done=bool(of_kind["done"]),
        config=read_config(config) if config.exists() else {},
        evaluations=_read_evaluations(run_dir / "evaluation"),
    )


class _Clock:
    """Adds up what every attempt took while its rows pass, those rolled back included."""

    def __init__(self) -> None:
        self._begins: dict[int, float] = {}
        self._ends: dict[int, float] = {}
        self._stepping = self._blocked = 0.0

    def listen(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            self._begins.setdefault(row["attempt"], row["wall_time"])
            self._ends[row["attempt"]] = row["wall_time"]
            if row["kind"] == "step":
                self._stepping += row["step_seconds"]
            if row["kind"] == "checkpoint":
                self._blocked += row.get("blocked_seconds", 0.0)
            yield row

    def spent(self, standing: list[dict[str, Any]]) -> Spent:
        stride = _stride(standing)
        kept = stride * sum(row["step_seconds"] for row in standing)
        running = sum(end - self._begins[attempt] for attempt, end in self._ends.items())
        wall = max(self._ends.values()) - min(self._begins.values())
        stepping = stride * self._stepping
        return Spent(
            wall_seconds=wall,
            standing_seconds=kept,
            data_seconds=stride * sum(row["data_seconds"] for row in standing),
            redone_seconds=stepping - kept,
            saving_seconds=self._blocked,
            other_seconds=max(0.0, running - stepping - self._blocked),
            between_seconds=max(0.0, wall - running),
        )


def _stride(steps: list[dict[str, Any]]) -> float:
    """Steps that one row stands for (logging.every_steps)."""
    numbers = [row["step"] for row in steps]
    return float(np.median(np.diff(numbers))) if len(numbers) > 1 else 1.0


def read_incidents(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """Records of the guard and of every node's supervisor, oldest first, and how many lines are
    none: a killed writer leaves a torn one, and the records around it still count. The last line
    without a newline is being written and is left out."""
    unreadable = 0
    found: list[dict[str, Any]] = []
    stem, suffix = Path(INCIDENTS_FILE).stem, Path(INCIDENTS_FILE).suffix
    for path in sorted(run_dir.glob(f"{stem}*{suffix}")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            record = _incident(line)
            if record is None:
                unreadable += 1
            else:
                found.append(record)
    return sorted(found, key=lambda record: float(record["wall_time"])), unreadable


def _incident(line: bytes) -> dict[str, Any] | None:
    """A record with what all of them have, or None."""
    try:
        record = decode_floats(json.loads(line))
    except ValueError:
        return None
    whole = (
        isinstance(record, dict)
        and isinstance(record.get("wall_time"), int | float)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("kind"), str)
    )
    return record if whole else None


def _thin_matrices(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Drop MATRICES from all but every k-th step row, k doubling as the run grows.

    Bounds the memory of a report on a long run: at most 2 MAX_MATRIX_ROWS of each are ever held.
    """
    holders: list[dict[str, Any]] = []
    stride = 1
    seen = 0
    for row in rows:
        if row["kind"] == "step":
            if seen % stride == 0:
                holders.append(row)
            else:
                _without_matrices(row)
            seen += 1
        if len(holders) >= 2 * MAX_MATRIX_ROWS:
            for dropped in holders[1::2]:
                _without_matrices(dropped)
            holders = holders[::2]
            stride *= 2
        yield row


def _without_matrices(row: dict[str, Any]) -> None:
    for key in MATRICES:
        row.pop(key, None)


def _phase_span(
    rows: list[dict[str, Any]],
    beside: list[dict[str, Any]],
    first_step: int,
    tokens_before: int,
) -> PhaseSpan:
    tail = np.array([row["loss"] for row in rows[-TAIL_ROWS:]], dtype=np.float64)
    tail = tail[np.isfinite(tail)]
    tokens = max(row.get("tokens", 0) for row in (rows[-1], *beside))
    return PhaseSpan(
        name=str(rows[0]["phase"]),
        first_step=first_step,
        last_step=max(row["step"] for row in (rows[-1], *beside)),
        tokens=tokens - tokens_before,
        final_loss=float(tail.mean()) if tail.size else float("nan"),
        validation={key: loss for row in beside for key, loss in row.get("losses", {}).items()},
        step_seconds=float(np.median([row["step_seconds"] for row in rows])),
        tokens_per_second=float(np.median([row["tokens_per_second"] for row in rows])),
    )


def _read_evaluations(directory: Path) -> list[Evaluation]:
    """Exact-match results, worst first: the untrained model before the trained one."""
    found = [_read_evaluation(path) for path in sorted(directory.glob("*.json"))]
    return sorted(found, key=lambda evaluation: evaluation.overall.share)


def _read_evaluation(path: Path) -> Evaluation:
    rule = "needs `total`, `correct` and `by_family` of {family: [correct, total]}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Evaluation(
            name=path.stem,
            overall=_score(record["correct"], record["total"]),
            by_family={name: _score(*pair) for name, pair in record["by_family"].items()},
            answers=[
                Answer(row["prompt"], row["reply"], row["expected"], row["correct"])
                for row in record.get("samples", [])
            ],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {rule} ({type(error).__name__}: {error})") from error


def _score(correct: int, total: int) -> Score:
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total}")
    return Score(total, correct)
