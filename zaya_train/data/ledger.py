"""The ledger of a run: what every step was made of, in a form that can be proved.

`<run>/ledger.jsonl` holds one line per phase that begins and one per step:

    {"kind": "phase", "name": ..., "step": 40, "stream": {...}}     what the rows follow from
    {"kind": "step", "step": 41, "first": 0, "rows": 32, "fingerprint": "9c..."}

A step's fingerprint is the sum modulo 2^64 of the fingerprints of the rows that all ranks really
read, so it does not depend on how many ranks there were nor on which read what. Nothing in the file
does: two runs of one configuration write the same bytes, whatever interrupted them. A run that
resumes at step N first cuts off what the lost process wrote after N.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import DataError, StorageError
from zaya_train.runtime.files import Records

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

LEDGER_FILE = "ledger.jsonl"
_WORD = 1 << 64


@dataclass(frozen=True)
class PhaseEntry:
    """A phase begins after `step` steps."""

    name: str
    step: int
    stream: dict[str, Any]


@dataclass(frozen=True)
class StepEntry:
    """One step over rows [first, first + rows) of its phase."""

    step: int
    first: int
    rows: int
    fingerprint: str


Entry = PhaseEntry | StepEntry


def add_fingerprints(fingerprints: Iterable[int]) -> int:
    """Sum modulo 2^64, as a signed number: what a sum of int64 tensors gives."""
    return (sum(fingerprints) + _WORD // 2) % _WORD - _WORD // 2


def fingerprint_text(fingerprint: int) -> str:
    """16 hexadecimal digits."""
    return f"{fingerprint % _WORD:016x}"


class LedgerWriter:
    """Appends to a run's ledger. Only the process with `enabled` touches the file."""

    def __init__(self, run_dir: Path, enabled: bool) -> None:
        self._path = run_dir / LEDGER_FILE
        self._records = Records(self._path)
        self._enabled = enabled
        self._begun = False
        self._phase: PhaseEntry | None = None
        self._done = 0

    def phase(self, entry: PhaseEntry, phase_rows: int) -> None:
        """A phase begins, or goes on after `phase_rows` rows.

        The first call opens the ledger and cuts off what a lost process wrote after `entry.step`.

        Raises:
            DataError: the ledger is damaged or ends before that step, or the phase would go on from
                another stream than it began with.
            StorageError: the file system refused.
        """
        if not self._enabled:
            return
        if not self._begun:
            self._open(entry.step)
            self._begun = True
        known = self._phase
        if known is not None and known.name == entry.name:
            different = _differences(known.stream, entry.stream)
            if different:
                raise DataError(
                    f"{self._path}: phase {entry.name} would go on with other data: "
                    f"{'; '.join(different)}; undo this, or end the phase where it stands (its "
                    "tokens) and begin another"
                )
            return
        self._phase, self._done = entry, phase_rows
        self._write({"kind": "phase", **asdict(entry)})

    def step(self, step: int, phase_rows: int, fingerprint: int) -> None:
        """A step is done that brought its phase to `phase_rows` rows."""
        if not self._enabled:
            return
        rows = phase_rows - self._done
        entry = StepEntry(step, self._done, rows, fingerprint_text(fingerprint))
        self._done = phase_rows
        self._write({"kind": "step", **asdict(entry)})

    def rewind(self) -> None:
        """The run goes back to a checkpoint: its next phase call cuts off what came after."""
        self._records.drop()
        self._begun = False

    def sync(self) -> None:
        """Flush to disk, before the checkpoint that counts on it.

        Raises:
            StorageError: the file system refused; entries wait for the next call.
        """
        self._records.sync()

    def close(self) -> None:
        """Safe to call twice."""
        self._records.close()

    def _open(self, step: int) -> None:
        self._records.open()
        try:
            self._phase, self._done, size = _stand(self._path, step)
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be read: {error.strerror}") from error
        self._records.truncate(size)

    def _write(self, values: dict[str, Any]) -> None:
        if not self._begun:
            raise ValueError("a ledger begins with a phase")
        self._records.append(json.dumps(values, separators=(",", ":")).encode())


def read_ledger(run_dir: Path) -> list[Entry]:
    """All entries in order.

    Raises:
        DataError: missing, or a line that is none, by number. A last line without its end is left
            out: the process that wrote it was killed.
    """
    path = run_dir / LEDGER_FILE
    if not path.is_file():
        raise DataError(f"{path}: missing")
    return [entry for entry, _ in _entries(path)]


def _entries(path: Path) -> Iterator[tuple[Entry, int]]:
    """Entries with the offset of the byte after each."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                values = json.loads(line)
                made = PhaseEntry if values.pop("kind") == "phase" else StepEntry
                yield made(**values), offset
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}:{number}: not a ledger entry ({error})") from error


def _stand(path: Path, step: int) -> tuple[PhaseEntry | None, int, int]:
    """Phase and its rows done when `step` steps were, and the size of the ledger then.

    A phase that began after `step` steps and has made none is cut off with them: it begins again.
    """
    phase, pending = None, None
    done = size = reached = 0
    for entry, offset in _entries(path):
        if isinstance(entry, PhaseEntry):
            if size == 0 and pending is None:
                # A branched run's ledger begins where its checkpoint stands.
                reached = entry.step
            pending = entry
            continue
        if entry.step > step:
            break
        if pending is not None:
            phase, pending = pending, None
        reached, done, size = entry.step, entry.first + entry.rows, offset
    if reached != step and path.stat().st_size:
        raise DataError(
            f"{path}: ends at step {reached}, the checkpoint is at step {step}; remove the ledger "
            "to begin a new one there"
        )
    return phase, done, size


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
