"""metrics.jsonl, the append-only record of a run, and how it is read back.

One JSON object per line, valid JSON throughout. Every row carries `kind`, `wall_time` (Unix
seconds) and `attempt` (1 for the first process that opened the file, 2 for the next ...). A row
counts once its newline is on disk; whatever follows the last newline was torn by a killed writer.

Non-finite numbers, which JSON does not have, are the strings "NaN", "Infinity" and "-Infinity";
`read_metrics` turns exactly these strings back into floats. The other numbers keep every digit, so
two runs can be compared bit by bit, except `load`, which is rounded to LOAD_DIGITS.

Nothing is ever rewritten. After a roll back the rows of the abandoned steps stay in the file;
a `start` or `resume` row at step N supersedes every earlier row of a later step, and readers drop
those (`current_rows`).
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import DataError, StorageError
from zaya_train.runtime.files import Records

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

METRICS_FILE = "metrics.jsonl"
LOAD_DIGITS = 5  # 40 layers x 17 classes would be 12 KB a row in full; 1e-5 is one token in 100 K

_STEP_FIELDS = (
    "step",
    "phase",
    "phase_step",
    "tokens",
    "loss",
    "grad_norm",
    "muon_lr",
    "adamw_lr",
    "supervised_tokens",
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
    "applied",
    "load",
    "load_entropy",
    "skip_rate",
    "max_violation",
    "memory_bytes",
)
OBSERVED_FIELDS = (
    "stream_rms",
    "eda_gain",
    "balancing_bias",
    "memory_bytes_ranks",
    "drawn_rows",
)
"""Step fields since 2026-11-22, which older runs lack; observe.py has their units. `drawn_rows`:
rows of every source in this phase so far, each of the context_tokens of the phase."""

ROW_FIELDS: dict[str, frozenset[str]] = {
    "start": frozenset({"step", "world_size", "device", "config_hash"}),
    "resume": frozenset({"step", "world_size", "device", "config_hash"}),
    "step": frozenset(_STEP_FIELDS),
    "eval": frozenset({"step", "phase", "losses"}),
    "checkpoint": frozenset({"step", "path", "seconds", "bytes"}),
    "save_failed": frozenset({"step", "reason", "in_a_row"}),
    "phase": frozenset({"name", "event", "step"}),
    "done": frozenset({"step"}),
}
"""Fields a row of each kind must have; a writer may add more. `tokens` counts all consumed so far,
`loss` is per supervised token, `load` holds per layer the fraction of tokens each class got,
`load_entropy` is the mean over layers of H(p) / ln E, `applied` is false for a step that changed
no weight, `event` is begin or end; docs/report.md has all fields with their units.
`start` and `resume` of a run also have `config_changes`: dotted key -> [old, new] since the attempt
before."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends rows to `<run_dir>/metrics.jsonl`.

    Only the rank with `enabled` touches the file. Opening for append first cuts a torn last line
    off, and raises StorageError naming the file where it cannot be opened. Rows that the file
    system refuses later wait (runtime.files.Records).
    """

    def __init__(self, run_dir: Path, enabled: bool) -> None:
        self.path = run_dir / METRICS_FILE
        self.attempt = 1
        self._enabled = enabled
        self._closed = False
        if not enabled:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _cut_torn_line(self.path)
                self.attempt = 1 + max((row["attempt"] for row in iter_rows(self.path)), default=0)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot open for append: {error.strerror}") from error
        self._records = Records(self.path)
        self._records.open()

    def write(self, kind: str, **values: Any) -> None:
        """Append one row and hand it to the operating system.

        Raises ValueError for an unknown kind or a missing field, TypeError for a value that is not
        plain Python data (a tensor would hide a device synchronisation).
        """
        missing = _required(kind) - values.keys()
        if missing:
            raise ValueError(f"metrics row `{kind}` lacks {', '.join(sorted(missing))}")
        if not self._enabled:
            return
        if "load" in values:
            values["load"] = [[round(x, LOAD_DIGITS) for x in layer] for layer in values["load"]]
        row = {"kind": kind, "wall_time": time.time(), "attempt": self.attempt, **values}
        line = json.dumps(encode_floats(row), allow_nan=False, separators=(",", ":"))
        self._records.append(line.encode())

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if not self._enabled or self._closed:
            return
        self._closed = True
        self._records.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of the run as it stands, in the order written, superseded ones left out.

    Raises DataError naming the file when it is missing, and file and line when a row other than a
    torn last one is not a metrics row.
    """
    return current_rows(iter_rows(run_dir / METRICS_FILE))


def iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole row of a metrics file, superseded ones included. Errors as `read_metrics`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield decode_line(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: cannot read metrics: {error.strerror}") from error


def rows_between(
    path: Path, start: int, end: int | None = None
) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, position behind it) of every whole row from byte `start` on, up to byte `end`. Errors
    as `read_metrics`."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                if not line.endswith(b"\n") or (end is not None and start > end):
                    return
                yield decode_line(line, f"{path}: byte {start - len(line)}"), start
    except OSError as error:
        raise DataError(f"{path}: cannot read metrics: {error.strerror}") from error


def current_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop rows of steps that a later `start` or `resume` rolled back.

    `start` and `resume` rows themselves stay: they are the record of what happened. A second
    `start` follows a run that died before its first checkpoint.
    """
    kept: list[dict[str, Any]] = []
    for row in rows:
        if is_launch(row):
            kept = [old for old in kept if is_launch(old) or old["step"] <= row["step"]]
        kept.append(row)
    return kept


def is_launch(row: dict[str, Any]) -> bool:
    """Whether the row marks a process taking up the run."""
    return row["kind"] in ("start", "resume")


def _required(kind: str) -> frozenset[str]:
    if kind not in ROW_FIELDS:
        raise ValueError(f"unknown metrics row `{kind}`; known: {', '.join(ROW_FIELDS)}")
    return ROW_FIELDS[kind]


def encode_floats(value: Any) -> Any:
    """Plain data with every number JSON does not have made its string (see above)."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: encode_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_floats(item) for item in value]
    return value


def decode_floats(value: Any) -> Any:
    """Plain data with such strings made numbers again."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_floats(item) for item in value]
    return value


def decode_line(line: bytes, where: str) -> dict[str, Any]:
    """One row from its line; DataError with `where` if it is none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    kind = row.get("kind") if isinstance(row, dict) else None
    if kind not in ROW_FIELDS:
        raise DataError(f"{where}: not a metrics row: kind is {kind!r}")
    missing = {"attempt", "wall_time", *ROW_FIELDS[kind]} - row.keys()
    if missing:
        raise DataError(f"{where}: `{kind}` row lacks {', '.join(sorted(missing))}")
    return {key: decode_floats(value) for key, value in row.items()}


def _cut_torn_line(path: Path) -> None:
    """Truncate after the last newline, reading backwards in blocks."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep, block = end, b""
        while keep > 0:
            start = max(0, keep - 65_536)
            file.seek(start)
            block = file.read(keep - start)
            newline = block.rfind(b"\n")
            keep = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if keep < end:
            file.truncate(keep)
