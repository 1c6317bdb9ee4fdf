"""One unbroken run of two ranks that all tests of broken ones compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.runs import Launched, make_corpora, overrides_for, values_for

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """Run directory; thirteen steps, a checkpoint after every third and at both phases' ends."""
    folder = tmp_path_factory.mktemp("unbroken")
    words = overrides_for(values_for(folder / "run", corpora))
    launched = Launched(words, folder, ranks=2)
    assert launched.wait() == [0, 0], launched.output()
    return folder / "run"
