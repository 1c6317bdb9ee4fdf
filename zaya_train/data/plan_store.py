"""Plans on disk: made once, read by every rank of every start, checked by hash.

    <folder>/<key>/   plan.json and one file per array of a RowPlan

The key is a hash of everything the plan follows from, the corpus's content included, so a plan is
never used for another corpus and never made again for the same one. Arrays are read row by row.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from zaya_train.config.errors import DataError, StorageError
from zaya_train.data.array_file import ArrayFile
from zaya_train.data.row_plan import PLAN_VERSION, Pieces, RowPlan
from zaya_train.runtime.files import NO_LOCKS, file_sha256, whole_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

_LOG = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
_ARRAYS = ("documents", "starts", "lengths", "offsets", "supervised", "work")


@dataclass(frozen=True, eq=False)
class StoredPlan:
    """A plan opened for reading; made by `stored_plan`."""

    key: str
    facts: Mapping[str, int]
    arrays: Mapping[str, ArrayFile] = field(repr=False)

    def __len__(self) -> int:
        return len(self.arrays["supervised"])

    def row(self, index: int) -> Pieces:
        """Pieces of one row, in order."""
        first, stop = self.arrays["offsets"].read(index, index + 2).tolist()
        return self._pieces(first, stop)

    def work(self, index: int) -> int:
        """Sum of squared piece lengths of one row."""
        return int(self.arrays["work"].read(index, index + 1)[0])

    def supervised(self, index: int) -> int:
        """Targets of one row."""
        return int(self.arrays["supervised"].read(index, index + 1)[0])

    def rows(self) -> tuple[Pieces, np.ndarray]:
        """All pieces, and [rows + 1] offsets: for those who need every row at once."""
        return self._pieces(0, len(self.arrays["documents"])), self.array("offsets")

    def array(self, name: str) -> np.ndarray:
        """A whole array."""
        return self.arrays[name].read(0, len(self.arrays[name]))

    def _pieces(self, first: int, stop: int) -> Pieces:
        return Pieces(
            *(self.arrays[name].read(first, stop) for name in ("documents", "starts", "lengths"))
        )


def plan_key(parts: Mapping[str, Any]) -> str:
    """Name of the plan that follows from `parts`, JSON values all."""
    text = json.dumps({"plan_version": PLAN_VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def stored_plan(folder: Path, key: str, prepare: Callable[[], Callable[[], RowPlan]]) -> StoredPlan:
    """The plan named `key`; made and stored where there is none yet.

    Of several processes that ask at once, one makes it and the others wait, where the file system
    has locks; elsewhere each makes the same plan.

    Args:
        folder: where plans lie.
        key: from `plan_key`.
        prepare: opens what the plan is made from, other plans in `folder` for instance, and returns
            what makes it. It runs before the lock is taken, which a process gets only once.

    Raises:
        DataError: a stored plan is damaged.
        StorageError: the file system refused.
    """
    target = folder / key
    if not (target / PLAN_FILE).is_file():
        make = prepare()
        with _locked(folder):
            if not (target / PLAN_FILE).is_file():
                _store(target, key, make())
    return _open(target, key)


def _store(target: Path, key: str, plan: RowPlan) -> None:
    arrays = {
        **plan.pieces._asdict(),
        "offsets": plan.offsets,
        "supervised": plan.supervised,
        "work": plan.work,
    }
    with whole_directory(target) as folder:
        files = {}
        for name in _ARRAYS:
            file = folder / f"{name}.bin"
            np.ascontiguousarray(arrays[name], dtype="<i8").tofile(file)
            files[name] = {"items": len(arrays[name]), "sha256": file_sha256(file)}
        content = {"key": key, "facts": dict(plan.facts), "files": files}
        (folder / PLAN_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _LOG.info("plan %s: %d rows stored", key, len(plan))


def _open(target: Path, key: str) -> StoredPlan:
    file = target / PLAN_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found, facts, files = content["key"], content["facts"], content["files"]
        entries = {name: (int(files[name]["items"]), files[name]["sha256"]) for name in _ARRAYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged plan ({error}); remove {target}") from error
    if found != key:
        raise DataError(f"{file}: holds plan {found}; remove {target}")
    arrays = {}
    for name, (items, sha256) in entries.items():
        path = target / f"{name}.bin"
        if not path.is_file() or file_sha256(path) != sha256:
            raise DataError(f"{path}: content differs from its sha256; remove {target}")
        arrays[name] = ArrayFile(path, "<i8", items)
    return StoredPlan(key, facts, arrays)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, by an advisory lock that ends with the process."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise StorageError(
            f"{folder}: plans cannot be stored: {error.strerror}; data.plan_dir names another place"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise StorageError(f"{path}: cannot be locked: {error.strerror}") from error
            _LOG.warning("%s: no locks on this file system; every process plans for itself", path)
        yield
