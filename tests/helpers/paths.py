"""Where test inputs outside the repository lie."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def shared_data(name: str) -> Path:
    """A file of ../shared/data; the test is skipped where it is absent."""
    path = REPOSITORY.parent / "shared" / "data" / name
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/{name}")
    return path
