"""Which commit of this project is running."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import zaya_train


@dataclass(frozen=True)
class Revision:
    """A commit, and whether files git tracks differ from it."""

    commit: str
    """Empty where the package does not run from a checkout."""
    dirty: bool


def revision() -> Revision:
    """Of the checkout the package is imported from."""
    folder = Path(zaya_train.__file__).parent
    commit = _git(folder, "rev-parse", "HEAD")
    # Untracked files change nothing that runs, and bench results are such files at first.
    return Revision(commit, bool(commit and _git(folder, "status", "--porcelain", "-uno")))


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
