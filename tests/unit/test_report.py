"""The report page: complete, self-contained, true to the rows that stand."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from zaya_train.config.errors import DataError, StorageError
from zaya_train.tools.report import report
from zaya_train.tools.report_data import MAX_LOAD_ROWS, load_run
from zaya_train.tools.report_figure import BAND, GRID, INK, MUTED, smooth, thin
from zaya_train.train.metrics import METRICS_FILE, MetricsWriter

if TYPE_CHECKING:
    from pathlib import Path

LAUNCH: dict[str, Any] = {"world_size": 2, "device": "cpu", "config_hash": "0123456789abcdef"}
PHASES = ("core", "long")
STEPS_PER_PHASE = 30


def step_values(step: int, loss: float, layers: int = 3) -> dict[str, Any]:
    phase_step = (step - 1) % STEPS_PER_PHASE + 1
    return {
        "step": step,
        "phase": PHASES[(step - 1) // STEPS_PER_PHASE],
        "phase_step": phase_step,
        "tokens": 1000 * step,
        "loss": loss,
        "grad_norm": 1.0 + step / 100,
        "muon_lr": 1e-3,
        "adamw_lr": 4e-4,
        "supervised_tokens": 900,
        "step_seconds": 0.5,
        "data_seconds": 0.01,
        "tokens_per_second": 2000.0,
        "applied": math.isfinite(loss),
        "load": [[0.5, 0.3, 0.2]] * layers,
        "load_entropy": 0.95,
        "skip_rate": 0.2,
        "max_violation": 0.5,
        "memory_bytes": 2**30,
    }


def write_attempt(run_dir: Path, first: int, last: int, shift: float = 0.0) -> None:
    with MetricsWriter(run_dir, [], enabled=True) as metrics:
        metrics.write("resume" if first else "start", step=first, **LAUNCH)
        for step in range(first + 1, last + 1):
            loss = math.nan if step == 7 else 5.0 / step + shift
            metrics.write("step", **step_values(step, loss))
            if step % 10 == 0:
                phase = PHASES[(step - 1) // STEPS_PER_PHASE]
                losses = {"text": 6.0 / step + shift, "sums": 7.0 / step + shift}
                metrics.write("eval", step=step, phase=phase, losses=losses)
                path = f"checkpoints/step-{step}"
                metrics.write("checkpoint", step=step, path=path, seconds=0.1, bytes=3_000_000)


def write_run(run_dir: Path) -> Path:
    """60 steps in two phases, 25 of them abandoned (loss shifted by 100) and done again."""
    write_attempt(run_dir, 0, 20)
    write_attempt(run_dir, 20, 45, shift=100.0)
    write_attempt(run_dir, 20, 60)
    with MetricsWriter(run_dir, [], enabled=True) as metrics:
        metrics.write("done", step=60)
    return run_dir


def write_evaluation(run_dir: Path, name: str, record: dict[str, Any]) -> None:
    (run_dir / "evaluation").mkdir(exist_ok=True)
    (run_dir / "evaluation" / f"{name}.json").write_text(json.dumps(record))


def scored(correct: int) -> dict[str, Any]:
    sample = {"id": "1", "family": "sums", "prompt": "1 < 2?", "answer": "yes", "finished": True}
    sample |= {"reply": "<think>so</think>yes", "expected": "yes", "correct": correct > 0}
    families = {"sums": [correct, 10], "clock": [correct, 10]}
    return {"total": 20, "correct": 2 * correct, "by_family": families, "samples": [sample]}


class Page(HTMLParser):
    """What the tests ask of the page: ids, references, tables and figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.figures: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {key: value or "" for key, value in attrs}
        self.tags.add(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named[key] for key in ("href", "src", "xlink:href") if key in named]
        if tag == "figure":
            self.figures.append(named["id"])
        if tag in ("td", "th"):
            self.cells.append("")
        self._in_cell = self._in_cell or tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = write_run(tmp_path_factory.mktemp("reports") / "tiny")
    write_evaluation(run_dir, "untrained", scored(0))
    write_evaluation(run_dir, "trained", scored(9))
    output = report([run_dir], run_dir / "report.html")
    return output, output.read_text()


def test_the_page_needs_nothing_from_outside(finished: tuple[Path, str]) -> None:
    output, text = finished
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object", "embed"}
    outside = [link for link in page.links if re.match(r"[a-z]+:", link)]
    assert all(link.startswith("data:") for link in outside)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    for link in set(page.links) - set(outside):
        if not link.startswith("#"):
            assert (output.parent / link).exists(), link


def test_ids_are_unique_and_every_reference_resolves(finished: tuple[Path, str]) -> None:
    page = Page(finished[1])
    assert len(page.ids) == len(set(page.ids))
    targets = set(re.findall(r"url\(#([^)]+)\)", finished[1]))
    targets |= {link[1:] for link in page.links if link.startswith("#")}
    assert targets and targets <= set(page.ids)


def test_all_figures_are_there_and_as_png(finished: tuple[Path, str]) -> None:
    output, text = finished
    names = ["loss", "exact_match", "learning_rate", "grad_norm", "router", "load"]
    names += ["throughput", "memory"]
    assert Page(text).figures == names
    for name in names:
        content = (output.parent / "report" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5_000
    assert not list(output.parent.rglob("*.tmp"))


def test_greys_follow_the_readers_theme(finished: tuple[Path, str]) -> None:
    svgs = "".join(re.findall(r"<svg.*?</svg>", finished[1], flags=re.DOTALL))
    assert not any(color in svgs for color in (INK, MUTED, GRID, BAND))
    for variable in ("ink", "muted", "grid", "band"):
        assert f"var(--{variable})" in svgs
    assert "prefers-color-scheme: dark" in finished[1] and "@media print" in finished[1]


def test_tables_tell_the_rows_that_stand(finished: tuple[Path, str]) -> None:
    cells = Page(finished[1]).cells
    core = sum(5.0 / step for step in range(11, 31)) / 20
    long = sum(5.0 / step for step in range(41, 61)) / 20
    at = cells.index("core")
    expected = ["1 to 30", "30 K", f"{core:.4g}", "0.2", f"{7 / 30:.4g}", "0.5", "2 K"]
    assert cells[at : at + 8] == ["core", *expected]
    at = cells.index("long")
    assert cells[at : at + 4] == ["long", "31 to 60", "30 K", f"{long:.4g}"]
    at = cells.index("sums")
    assert cells[at : at + 3] == ["sums", "0 of 10", "9 of 10"]
    assert cells.count("resume") == 2
    assert "checkpoints/step-60 (3 MB)" in cells
    assert "90.0 %" in finished[1]


def test_sampled_answers_of_the_best_model_are_shown(finished: tuple[Path, str]) -> None:
    assert "<h2>Sampled answers, trained</h2>" in finished[1]
    assert finished[1].count("<details>") == 1
    assert "right: 1 &lt; 2?" in finished[1] and "&lt;think&gt;so&lt;/think&gt;yes" in finished[1]


def test_equal_runs_give_equal_pages(finished: tuple[Path, str]) -> None:
    output, text = finished
    again = report([output.parent], output)
    # The report and its PNG directory are now listed among the files; the rest is the same.
    strip = re.compile(r"<h2>Where everything lies</h2>.*", flags=re.DOTALL)
    assert strip.sub("", again.read_text()) == strip.sub("", text)


@pytest.mark.filterwarnings("error")  # matplotlib warns when a layout collapses
def test_a_live_run_with_a_torn_line_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    write_attempt(tmp_path / "live", 0, 1)
    with (tmp_path / "live" / METRICS_FILE).open("a") as file:
        file.write('{"kind":"step","st')
    text = report([tmp_path / "live"], tmp_path / "report.html").read_text()
    assert "1 so far" in text
    assert "exact_match" not in Page(text).figures


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    text = report(runs, tmp_path / "both.html").read_text()
    figures = Page(text).figures
    assert figures.count("loss") == 1
    assert {"load_one", "load_two"} <= set(figures)
    assert Page(text).cells.count("core") == 2
    (tmp_path / "elsewhere").mkdir()
    twin = write_run(tmp_path / "elsewhere" / "one")
    with pytest.raises(DataError, match="different directory names, got one, one"):
        report([runs[0], twin], tmp_path / "twins.html")


def test_names_are_escaped(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a<b>&'\"c")
    text = report([run_dir], tmp_path / "report.html").read_text()
    assert "<b>&" not in text and "a&lt;b&gt;&amp;" in text


@pytest.mark.parametrize("content", [None, "", "start"])
def test_a_run_without_steps_is_an_error_that_names_the_file(
    tmp_path: Path, content: str | None
) -> None:
    if content == "start":
        MetricsWriter(tmp_path, [], enabled=True).write("start", step=0, **LAUNCH)
    elif content is not None:
        (tmp_path / METRICS_FILE).write_text(content)
    output = tmp_path / "out" / "report.html"
    with pytest.raises(DataError, match=METRICS_FILE):
        report([tmp_path], output)
    assert not output.parent.exists()


@pytest.mark.parametrize(
    "record",
    [
        {"total": 3, "correct": 4, "by_family": {}},
        {"total": 0, "correct": 0, "by_family": {}},
        {"total": 3, "correct": 1},
        {"total": 3, "correct": 1, "by_family": {"sums": 0.5}},
        {"total": 3, "correct": 1, "by_family": {"sums": [3, 1]}},
        [],
    ],
)
def test_a_malformed_evaluation_is_named(tmp_path: Path, record: Any) -> None:
    run_dir = write_run(tmp_path / "run")
    write_evaluation(run_dir, "trained", record)
    with pytest.raises(DataError, match=r"trained\.json: needs `total`, `correct`"):
        report([run_dir], tmp_path / "report.html")


def test_load_that_changes_shape_is_an_error(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 3)
    with MetricsWriter(tmp_path, [], enabled=True) as metrics:
        metrics.write("step", **step_values(4, 1.0, layers=5))
    with pytest.raises(DataError, match=r"metrics\.jsonl: `load` changes its shape"):
        load_run(tmp_path)


def test_no_run_and_an_unwritable_place_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        report([], tmp_path / "report.html")
    run_dir = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not written"):
        report([run_dir], tmp_path / "file" / "report.html")


def test_loads_of_a_long_run_are_thinned_evenly(tmp_path: Path) -> None:
    rows = 5 * MAX_LOAD_ROWS
    row = {"kind": "step", "wall_time": 0.0, "attempt": 1, **step_values(1, 1.0)}
    with (tmp_path / METRICS_FILE).open("w") as file:
        for step in range(1, rows + 1):
            file.write(json.dumps(row | {"step": step}) + "\n")
    run = load_run(tmp_path)
    steps, loads = run.loads
    assert len(run.steps) == rows
    assert MAX_LOAD_ROWS <= len(steps) < 2 * MAX_LOAD_ROWS and loads.shape[1:] == (3, 3)
    assert set(np.diff(steps)) == {4.0} and steps[0] == 1


def test_thin_keeps_spikes_and_drops_what_cannot_be_drawn() -> None:
    x = np.arange(100_000, dtype=np.float64)
    y = np.sin(x / 3000)
    y[12_345], y[54_321], y[77_777] = 50.0, -40.0, np.nan
    few_x, few_y = thin(x, y)
    assert len(few_x) <= 600 and np.all(np.diff(few_x) > 0)
    assert {12_345.0, 54_321.0, 0.0, 99_999.0} <= set(few_x)
    assert few_y.max() == 50.0 and few_y.min() == -40.0 and np.isfinite(few_y).all()
    same_x, same_y = thin(x[:5], y[:5])
    assert np.array_equal(same_x, x[:5]) and np.array_equal(same_y, y[:5])


def test_smooth_is_an_unbiased_running_mean() -> None:
    constant = smooth(np.array([3.0, 3.0, np.nan, 3.0]), span=10)
    assert np.allclose(constant, 3.0)
    # span 3: weights 1/2, so the second value is (0.5 * 1 + 4) / 1.5
    assert np.allclose(smooth(np.array([1.0, 4.0]), span=3), [1.0, 3.0])
    assert np.isnan(smooth(np.array([np.nan, 1.0]), span=3)[0])
