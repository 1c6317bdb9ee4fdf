"""`zaya checkpoint ls` and `verify`: what checkpoints there are, and whether they can be trusted.

A path names a run directory, its `checkpoints`, or one checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from zaya_train.config.errors import (
    EXIT_NO_CHECKPOINT,
    EXIT_OK,
    EXIT_STORAGE,
    CheckpointError,
)
from zaya_train.run import CHECKPOINTS
from zaya_train.train import manifest as manifests
from zaya_train.train.peers import Peers
from zaya_train.train.restore import Found, brief, find_newest, inspect, layout_problems, verified
from zaya_train.train.storage import BAD_NAME, LEFTOVER_NAME, STEP_NAME, list_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from zaya_train.train.manifest import Manifest

COLUMNS = ("checkpoint", "phase", "tokens", "tensors", "size", "mesh", "kept", "age", "state")
_EMPTY = [""] * (len(COLUMNS) - 2)
_STATES = {
    ".tmp": "unfinished: its writer died or is still at work",
    ".trash": "its deletion was not finished",
    ".bad": "moved aside: did not verify",
}


@dataclass(frozen=True)
class Listed:
    """One directory among checkpoints."""

    path: Path
    manifest: Manifest | None
    problems: tuple[str, ...]

    @property
    def usable(self) -> bool:
        return self.manifest is not None and not self.problems


def root_of(path: Path) -> Path:
    """The directory of checkpoints at `path`, a run directory or that directory itself."""
    return path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path


def checkpoint_at(path: Path) -> Found:
    """The checkpoint at `path`, or the newest that verifies in the run there. Reads every byte.

    Raises:
        CheckpointError: it does not verify, or there is none.
    """
    if not _is_checkpoint(path):
        found, _ = find_newest(root_of(path))
        if found is None:
            raise CheckpointError(f"{path}: holds no checkpoint")
        return found
    return verified(path, Peers())


def show_checkpoints(path: Path, console: Console) -> int:
    """Table of the checkpoints at `path`, oldest first; file contents are not read.

    Returns 3 when none could be used, else 0.

    Raises:
        CheckpointError: there is no such directory.
    """
    listed = [_listed(checkpoint) for checkpoint in _checkpoints(path)]
    root = root_of(path)
    table = Table(*COLUMNS)
    for entry in listed:
        table.add_row(*_cells(entry))
    leftovers = [*list_names(root, LEFTOVER_NAME), *list_names(root, BAD_NAME)]
    if not listed and not leftovers:
        console.print(f"{root}: no checkpoint", markup=False, soft_wrap=True)
        return EXIT_NO_CHECKPOINT
    for name in leftovers:
        suffix = "." + name.split(".")[1].split("-")[0]
        table.add_row(name, *_EMPTY, Text(_STATES[suffix], "yellow"))
    console.print(table)
    return EXIT_OK if any(entry.usable for entry in listed) else EXIT_NO_CHECKPOINT


def verify_checkpoints(paths: Sequence[Path], console: Console) -> int:
    """Read every byte of the checkpoints at `paths` and hold it against their manifests.

    Returns 0 when all verify, 4 when only some do, 3 when none does.

    Raises:
        CheckpointError: a path does not exist.
    """
    checkpoints = [checkpoint for path in paths for checkpoint in _checkpoints(path)]
    usable = 0
    for path in checkpoints:
        begin = time.perf_counter()
        manifest, problems = inspect(path, Peers())
        if manifest and not problems:
            usable += 1
            seconds, files = time.perf_counter() - begin, len(manifest.files)
            said = f"verifies: {files} files, {size_text(_size_bytes(manifest))}, {seconds:.1f} s"
            console.print(Text(f"{path}: {said}", "green"))
        for problem in problems:
            console.print(Text(f"{path}: {problem}", "red"))
    console.print(f"{usable} of {len(checkpoints)} checkpoints verify")
    if usable == 0:
        return EXIT_NO_CHECKPOINT
    return EXIT_OK if usable == len(checkpoints) else EXIT_STORAGE


def size_text(size_bytes: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


def _is_checkpoint(path: Path) -> bool:
    return bool(STEP_NAME.fullmatch(path.name)) or (path / manifests.MANIFEST_NAME).is_file()


def _checkpoints(path: Path) -> list[Path]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if _is_checkpoint(path):
        return [path]
    root = root_of(path)
    return [root / name for name in list_names(root, STEP_NAME)]


def _listed(path: Path) -> Listed:
    """The manifest, and what is wrong without reading the files: sizes, missing, surplus."""
    try:
        manifest = manifests.read(path)
    except CheckpointError as error:
        return Listed(path, None, (str(error),))
    problems = layout_problems(path, manifest)
    for entry in manifest.files:
        problem = manifests.size_problem(path, entry)
        problems += [problem] if problem else []
    return Listed(path, manifest, tuple(problems))


def _cells(entry: Listed) -> list[str | Text]:
    state = Text(brief(list(entry.problems)), "red") if entry.problems else Text("sizes fit")
    if entry.manifest is None:
        return [entry.path.name, *_EMPTY, state]
    record = entry.manifest.record
    return [
        entry.path.name,
        record.phase_name,
        f"{record.train_state.get('tokens', 0):,}",
        str(len(entry.manifest.tensors)),
        size_text(_size_bytes(entry.manifest)),
        " x ".join(f"{axis} {size}" for axis, size in record.mesh.items() if size > 1) or "1 rank",
        "yes" if record.keep else "",
        _age_text(time.time() - entry.path.stat().st_mtime),
        state,
    ]


def _age_text(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size_bytes(manifest: Manifest) -> int:
    return sum(entry.size_bytes for entry in manifest.files)
