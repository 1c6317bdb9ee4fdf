"""metrics.jsonl as the record of a run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from zaya_train.config.errors import DataError, StorageError
from zaya_train.train.metrics import METRICS_FILE, MetricsWriter, read_metrics

if TYPE_CHECKING:
    from pathlib import Path

LAUNCH: dict[str, Any] = {"world_size": 1, "device": "cpu", "config_hash": "ab"}


def step_values(step: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step": step,
        "phase": "core",
        "phase_step": step,
        "tokens": 64 * step,
        "loss": 1.0 / 3.0 + step,
        "grad_norm": 0.5,
        "muon_lr": 1e-3,
        "adamw_lr": 1e-3,
        "supervised_tokens": 50,
        "step_seconds": 0.1,
        "data_seconds": 0.01,
        "tokens_per_second": 640.0,
        "applied": True,
        "load": [[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]],
        "load_entropy": 0.9,
        "skip_rate": 0.1,
        "max_violation": 0.4,
        "memory_bytes": 1000,
    }
    return values | changes


def write_run(run_dir: Path, launch: str, first: int, last: int) -> None:
    with MetricsWriter(run_dir, enabled=True) as metrics:
        metrics.write(launch, step=first, **LAUNCH)
        for step in range(first + 1, last + 1):
            metrics.write("step", **step_values(step))


def steps_of(run_dir: Path) -> list[tuple[int, int]]:
    rows = read_metrics(run_dir)
    return [(row["step"], row["attempt"]) for row in rows if row["kind"] == "step"]


def test_rows_come_back_exactly_and_are_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, enabled=True)
    writer.write("start", step=0, **LAUNCH)
    writer.write("step", **step_values(1))
    rows = read_metrics(tmp_path)  # before close: flushed row by row
    writer.close()
    writer.close()
    assert [row["kind"] for row in rows] == ["start", "step"]
    assert rows[1]["loss"] == 1.0 / 3.0 + 1  # every bit
    assert rows[1]["attempt"] == 1 and rows[1]["wall_time"] > 1.7e9


def test_load_is_rounded_and_nothing_else(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        metrics.write("step", **step_values(1, load=[[1 / 3, 2 / 3]], load_entropy=1 / 3))
    row = read_metrics(tmp_path)[0]
    assert row["load"] == [[0.33333, 0.66667]]
    assert row["load_entropy"] == 1 / 3


def test_non_finite_values_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        values = step_values(1, loss=math.nan, grad_norm=math.inf, applied=False)
        metrics.write("step", **values)
        metrics.write("eval", step=1, phase="core", losses={"text": -math.inf})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    step, evaluation = read_metrics(tmp_path)
    assert math.isnan(step["loss"]) and step["grad_norm"] == math.inf and step["applied"] is False
    assert evaluation["losses"]["text"] == -math.inf


def test_only_the_enabled_rank_writes(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", enabled=False) as metrics:
        metrics.write("step", **step_values(1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("enabled", [True, False])
def test_rows_that_break_the_contract_are_refused_on_every_rank(
    tmp_path: Path, enabled: bool
) -> None:
    with MetricsWriter(tmp_path, enabled=enabled) as metrics:
        with pytest.raises(ValueError, match="unknown metrics row `stpe`; known: start"):
            metrics.write("stpe", step=1)
        with pytest.raises(ValueError, match="row `eval` lacks losses, phase"):
            metrics.write("eval", step=1)
    if enabled:
        assert (tmp_path / METRICS_FILE).read_bytes() == b""


def test_values_that_are_not_plain_data_are_refused_before_the_file_is_touched(
    tmp_path: Path,
) -> None:
    with (
        MetricsWriter(tmp_path, enabled=True) as metrics,
        pytest.raises(TypeError, match="not JSON serializable"),
    ):
        metrics.write("step", **step_values(1, loss=object()))
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"kind":"st', b'{"kind":"done","step":9}', b"\x00" * 200_000])
def test_a_torn_last_line_is_ignored_then_cut(tmp_path: Path, torn: bytes) -> None:
    write_run(tmp_path, "start", 0, 3)
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert steps_of(tmp_path) == [(1, 1), (2, 1), (3, 1)]
    MetricsWriter(tmp_path, enabled=True).close()
    assert path.read_bytes() == whole


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b'{"kind"')
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        assert metrics.attempt == 1
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


def test_a_resume_supersedes_later_steps_of_earlier_attempts(tmp_path: Path) -> None:
    write_run(tmp_path, "start", 0, 5)
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        metrics.write("eval", step=4, phase="core", losses={"text": 1.0})
        metrics.write("checkpoint", step=3, path="c3", seconds=0.1, bytes=1)
        metrics.write("phase", name="core", event="end", step=5)
    write_run(tmp_path, "resume", 3, 6)
    write_run(tmp_path, "resume", 5, 6)
    rows = read_metrics(tmp_path)
    assert steps_of(tmp_path) == [(1, 1), (2, 1), (3, 1), (4, 3), (5, 3), (6, 4)]
    others = [(row["kind"], row["step"]) for row in rows if row["kind"] != "step"]
    assert others == [("start", 0), ("checkpoint", 3), ("resume", 3), ("resume", 5)]


def test_a_second_start_supersedes_a_run_that_never_saved(tmp_path: Path) -> None:
    write_run(tmp_path, "start", 0, 2)
    write_run(tmp_path, "start", 0, 1)
    assert steps_of(tmp_path) == [(1, 2)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops}", r":2: not JSON"),
        ("[1]", r":2: not a metrics row: kind is None"),
        ('{"kind":"boom","step":1}', r":2: not a metrics row: kind is 'boom'"),
        ('{"kind":"done","wall_time":1.0,"attempt":1}', r":2: `done` row lacks step"),
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str, reason: str) -> None:
    write_run(tmp_path, "start", 0, 0)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(line + "\n" + line + "\n")
    with pytest.raises(DataError, match=f"{METRICS_FILE}{reason}"):
        read_metrics(tmp_path)


def test_missing_and_unwritable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot read metrics: No such file"):
        read_metrics(tmp_path)
    (tmp_path / METRICS_FILE).mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot open for append"):
        MetricsWriter(tmp_path, enabled=True)


REFUSED_WRITE = """
import logging, pathlib, resource, sys
from zaya_train.train.metrics import MetricsWriter
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
metrics = MetricsWriter(pathlib.Path(sys.argv[1]), enabled=True)
metrics.write("done", step=1)
free, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for step, limit in ((2, 100), (3, 100), (4, free), (5, 400)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    metrics.write("done", step=step, note="x" * 20)
metrics.close()
metrics.close()
"""


def test_refused_rows_wait_and_are_written_in_order(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED_WRITE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    path = tmp_path / METRICS_FILE
    *told, lost = done.stdout.splitlines()
    assert told == [
        f"{path}: lines wait: File too large",
        f"{path}: written again, nothing was lost",
        f"{path}: lines wait: File too large",
    ]
    assert lost.startswith(f"{path}: ") and lost.endswith(" bytes lost: File too large")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert path.stat().st_size == 400, "the part of a row that fitted is not there"
    MetricsWriter(tmp_path, enabled=True).close()
    assert path.read_bytes().endswith(b"}\n")
