"""The terminal's view of a run: what it reads of a growing file, and what it says."""

from __future__ import annotations

import io
import json
import math
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from tests.unit.test_report import LAUNCH, step_values, write_attempt
from zaya_train.config.errors import DataError
from zaya_train.tools import tail as reading
from zaya_train.tools.report_data import read_incidents
from zaya_train.tools.tail import Tail
from zaya_train.tools.watch import BLOCKS, PLAIN_BLOCKS, frame, sparkline, watch
from zaya_train.train.guard import Incidents
from zaya_train.train.metrics import METRICS_FILE, MetricsWriter

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {
    "plan": {
        "phases": {
            "core": {"tokens": 29_900, "context_tokens": 1_000},
            "long": {"tokens": 30_000, "context_tokens": 500},
        }
    }
}


def line(step: int) -> bytes:
    row = {"kind": "step", "wall_time": 1.0, "attempt": 1, **step_values(step, 1.0)}
    return json.dumps(row).encode() + b"\n"


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows if row["kind"] == "step"]


def shown(run_dir: Path, now: float, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=file, width=100)
    console.print(frame(run_dir, Tail(run_dir / METRICS_FILE).read(), console, now))
    file.seek(0)
    return file.read()


def test_rows_come_as_they_are_written_and_torn_ones_when_whole(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    tail = Tail(path)
    assert tail.read() == []
    path.write_bytes(line(1) + line(2) + line(3)[:40])
    assert steps_of(tail.read()) == [1, 2]
    with path.open("ab") as file:
        file.write(line(3)[40:] + line(4)[:-1])
    assert steps_of(tail.read()) == [1, 2, 3]
    with path.open("ab") as file:
        file.write(b"\n")
    assert steps_of(tail.read()) == [1, 2, 3, 4]
    path.write_bytes(line(9))
    assert steps_of(tail.read()) == [9]


@pytest.mark.parametrize("inside", [-1, 0, 1, 50])
def test_of_a_long_file_only_the_end_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: int
) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(b"not JSON\n" + b"".join(line(step) for step in range(1, 10)))
    three = len(line(7) + line(8) + line(9))
    monkeypatch.setattr(reading, "TAIL_BYTES", three + inside)
    # A window that begins on a line's border loses that line: it cannot know.
    assert steps_of(Tail(path).read()) == ([7, 8, 9] if inside > 0 else [8, 9])


@pytest.mark.parametrize("inside", [-1, 0, 1])
def test_of_what_is_not_read_the_phases_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: int
) -> None:
    """Also one on whose border, or in which, the window begins."""
    path = tmp_path / METRICS_FILE
    begun = [json.dumps({"kind": "phase", "name": name, "event": "begin", "step": 0,
                         "wall_time": 1.0, "attempt": 1}).encode() + b"\n"
             for name in ("core", "long")]  # fmt: skip
    path.write_bytes(begun[0] + b"not JSON\n" + line(1) + line(2) + begun[1] + line(3))
    monkeypatch.setattr(reading, "TAIL_BYTES", len(begun[1] + line(3)) + inside)
    tail = Tail(path)
    rows = tail.read()
    assert [row["name"] for row in rows if row["kind"] == "phase"] == ["core", "long"]
    assert steps_of(rows) == [3]
    assert tail.read() == rows


def test_steps_that_were_rolled_back_are_gone(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 20)
    tail = Tail(tmp_path / METRICS_FILE)
    assert steps_of(tail.read())[-1] == 20
    write_attempt(tmp_path, 10, 12)
    assert steps_of(tail.read()) == [*range(1, 13)]


def test_a_spike_stays_in_a_sparkline() -> None:
    values = [1.0] * 1_000
    values[437] = 9.0
    drawn = sparkline(values, 20)
    assert len(drawn) == 20 and drawn.count(BLOCKS[-1]) == 1 and drawn.index(BLOCKS[-1]) == 8
    assert sparkline([1.0, math.nan, 3.0], 9, PLAIN_BLOCKS) == "_ @"
    assert sparkline([], 9) == "" and sparkline([math.nan], 9) == " "
    assert sparkline([2.0, 2.0], 9, PLAIN_BLOCKS) == "++"


def test_a_frame_says_where_the_run_is(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 45)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    newest = json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[-1])
    text = shown(tmp_path, newest["wall_time"] + 65)
    assert "newest row 1 min 5 s ago, attempt 1, 2 ranks on cpu" in text
    # 30 whole rows of the first phase and 30 K tokens, at 2,000 a second.
    assert "step 45 | phase long | 45 K tokens of 60 K | 7.5 s left at this rate" in text
    assert "0.1111" in text and "text 0.1500, sums 0.1750" in text
    assert "peak 1.00 GB" in text and "step 40, 3 MB" in text and "incidents: 0" in text


def test_a_frame_tells_the_supervisors_view_and_the_incidents(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 3)
    rank = {"rank": 0, "silent_seconds": 0.4, "phase": "forward", "step": 4}
    status = {"wall_time": 90.0, "state": "running", "slow_ranks": [5], "reason": ""}
    status["ranks"] = [rank, {**rank, "rank": 5, "silent_seconds": 31.0, "phase": "backward"}]
    (tmp_path / "status.json").write_text(json.dumps(status))
    record = {"wall_time": 40.0, "kind": "skipped_step", "step": 2, "reason": "norm too large"}
    later = {**record, "wall_time": 80.0, "kind": "hang", "reason": "rank 5 is stuck"}
    (tmp_path / "incidents.jsonl").write_text(json.dumps(record) + "\n" + '{"torn')
    (tmp_path / "incidents-node1.jsonl").write_text(json.dumps(later) + "\n")
    Incidents(tmp_path, 2, enabled=True).write(kind="skipped_step", step=3, reason="again")
    text = shown(tmp_path, 100.0)
    assert "supervisor, 10 s ago: running; quietest rank 5: 31.0 s in backward of step 4" in text
    assert "slow ranks [5]" in text and "incidents: 3; 1 unreadable lines" in text
    assert text.index("1 min 0 s ago: skipped step: norm") < text.index("20 s ago: hang: rank 5")


def test_terminals_without_unicode_get_plain_blocks(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 9)
    text = shown(tmp_path, time.time(), "ascii")
    assert "?" not in text and "loss" in text


def test_a_run_without_a_row_is_waited_for(tmp_path: Path) -> None:
    assert f"waiting for {METRICS_FILE}" in shown(tmp_path, 0.0)
    with pytest.raises(DataError, match="nowhere is no directory"):
        watch(tmp_path / "nowhere", Console(quiet=True), once=True, every_seconds=1.0)


def test_a_live_run_is_followed_to_its_end(tmp_path: Path) -> None:
    def train() -> None:
        with MetricsWriter(tmp_path, enabled=True) as metrics:
            metrics.write("start", step=0, **LAUNCH)
            for step in range(1, 4):
                metrics.write("step", **step_values(step, 1.0))
            metrics.write("done", step=3)

    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    trainer = threading.Thread(target=train)
    trainer.start()
    watch(tmp_path, console, once=False, every_seconds=0.01)
    trainer.join()
    assert "done" in file.getvalue() and "step 3 | phase core" in file.getvalue()


def test_a_record_is_not_lost_in_a_line_that_another_process_was_killed_inside(
    tmp_path: Path,
) -> None:
    guard = Incidents(tmp_path, 1, enabled=True)
    guard.write(kind="skipped_step", step=1)
    with guard.path.open("ab") as file:
        file.write(b'{"kind":"ha')  # the supervisor's file is the same one
    guard.write(kind="skipped_step", step=2)
    guard.write(kind="skipped_step", step=3)
    guard.close()
    found, unreadable = read_incidents(tmp_path)
    assert ([record["step"] for record in found], unreadable) == ([1, 2, 3], 1)
    assert guard.path.read_bytes().count(b"\n") == 4


def test_a_pipe_hears_of_a_run_that_has_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, seen = io.StringIO(), []

    def asleep(seconds: float) -> None:
        seen.append(pipe.getvalue())
        raise KeyboardInterrupt

    monkeypatch.setattr("zaya_train.tools.watch.time.sleep", asleep)
    watch(tmp_path, Console(file=pipe, width=100), once=False, every_seconds=1.0)
    assert len(seen) == 1 and "waiting for metrics.jsonl" in seen[0]
