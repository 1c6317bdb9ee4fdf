"""Ranks that are forks of the test process."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

from tests.helpers.distributed import run_ranks

if TYPE_CHECKING:
    from pathlib import Path


class _Left:
    """Tells where it was collected, in a cycle so that only the collector frees it."""

    def __init__(self, told: Path) -> None:
        self.told, self.itself = told, self

    def __del__(self) -> None:
        self.told.write_text(str(os.getpid()))


def _collect() -> bool:
    gc.collect()
    return True


def test_what_the_parent_left_is_not_collected_in_a_rank(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    gc.disable()
    try:
        left = _Left(told)
        del left
        assert run_ranks(_collect, 1) == [True]
        assert not told.exists()
        gc.collect()
    finally:
        gc.enable()
    assert told.read_text() == str(os.getpid())
