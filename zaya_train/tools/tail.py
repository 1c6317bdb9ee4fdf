"""The newest rows of a metrics file that may be growing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import DataError
from zaya_train.train.metrics import current_rows, decode_line

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

TAIL_BYTES = 8 << 20  # some 600 rows of a model with 40 layers
MAX_ROWS = 2_000
_KEPT = ("start", "resume", "phase")
"""Kinds of few rows that say what later ones are of: they stay however long ago they were."""
_KEPT_LINE = re.compile(rb'\{"kind": ?"(' + "|".join(_KEPT).encode() + rb')"')


@dataclass
class Tail:
    """The newest rows of a growing metrics file."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0

    def read(self) -> list[dict[str, Any]]:
        """Rows that stand, of the last TAIL_BYTES or since the first call, and the kept kinds' all.

        DataError as metrics.
        """
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    self.rows, self._offset = [], 0  # another run in the same place
                begin = self._offset
                if not self.rows and size - begin > TAIL_BYTES:
                    begin = size - TAIL_BYTES
                early = _kept_lines(file, begin) if begin > self._offset else []
                file.seek(begin)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        whole, newline, _ = data.rpartition(b"\n")
        if newline:
            lines = whole.split(b"\n")
            if begin > self._offset:
                lines[0:1] = early  # the window begins inside a line
            new = [decode_line(line, str(self.path)) for line in lines]
            rows = current_rows([*self.rows, *new])
            old = [row for row in rows[:-MAX_ROWS] if row["kind"] in _KEPT]
            self.rows = [*old, *rows[-MAX_ROWS:]]
            self._offset = begin + len(whole) + 1
        return self.rows


def _kept_lines(file: BinaryIO, end: int) -> list[bytes]:
    """Lines of the kept kinds that begin at `end` or before it."""
    kept, begin = [], 0
    file.seek(0)
    for line in file:
        if begin > end:
            break
        if line.endswith(b"\n") and _KEPT_LINE.match(line):
            kept.append(line.rstrip(b"\n"))
        begin += len(line)
    return kept
