"""The corpora of all runs here, and one unbroken run of two ranks to compare broken ones with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.runs import left_alone, make_corpora

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """Run directory; thirteen steps, a checkpoint after every third and at both phases' ends."""
    return left_alone(tmp_path_factory.mktemp("unbroken"), corpora, {}, ranks=2)
