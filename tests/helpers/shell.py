"""Scripts under test: linted, and run with nothing but chosen tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.paths import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Sequence


def beside_python(tool: str) -> str:
    """Path of a tool of the development environment; skips where it is not installed."""
    path = Path(sys.executable).parent / tool
    found = str(path) if path.exists() else shutil.which(tool)
    if found is None:
        pytest.skip(f"needs {tool}: pip install 'zaya-train[dev]'")
    return found


def shellcheck(scripts: Sequence[Path]) -> None:
    """AssertionError with what shellcheck says about any of them."""
    done = subprocess.run(
        [beside_python("shellcheck"), *map(str, scripts)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def executable(path: Path, body: str) -> Path:
    """A bash script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)
    return path


def only(directory: Path, *tools: str) -> Path:
    """A directory for PATH that holds these tools and no other."""
    directory.mkdir(parents=True)
    for tool in tools:
        (directory / tool).symlink_to(shutil.which(tool) or tool)
    return directory
