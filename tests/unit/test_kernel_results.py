"""The table of kernel timings: whole rows only, and none lost."""

from __future__ import annotations

import multiprocessing
from dataclasses import fields
from typing import TYPE_CHECKING

import pytest

from zaya_train.config.errors import DataError
from zaya_train.tools.kernel_results import Result, Setting, append, read

if TYPE_CHECKING:
    from pathlib import Path

SETTING = Setting("d", "a", "2.13", "3.7", "1", "c0ffee", False, "2026-11-22")
PROCESSES, ROWS = 4, 10


def result(backend: str) -> Result:
    words = {"op": "cca", "direction": "both", "backend": backend, "shape": "s", "dtype": "bf16"}
    numbers = {item.name: 1.0 for item in fields(Result) if item.name not in (*words, "rounds")}
    return Result(**words, rounds=3, **numbers)  # type: ignore[arg-type]


def _append_all(path: Path, number: int) -> None:
    for row in range(ROWS):
        append(path, SETTING, [result(f"{number}-{row}")])


def test_commands_at_the_same_time_lose_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_append_all, args=(path, number)) for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = sorted(row["backend"] for row in read(path))
    assert found == sorted(f"{n}-{row}" for n in range(PROCESSES) for row in range(ROWS))


def test_a_cut_row_is_named_and_nothing_put_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append(path, SETTING, [result("one"), result("two")])
    cut = path.read_text()[:-20]
    path.write_text(cut)
    with pytest.raises(DataError, match=r"results\.csv:3: \d+ cells, the header has"):
        append(path, SETTING, [result("three")])
    assert path.read_text() == cut
