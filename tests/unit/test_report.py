"""The report page: complete, self-contained, true to the rows that stand."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from zaya_train.config.errors import DataError, StorageError
from zaya_train.tools.report import report
from zaya_train.tools.report_data import MAX_MATRIX_ROWS, load_run
from zaya_train.tools.report_maps import average_over_time
from zaya_train.tools.report_panels import extremes, numbers, smooth
from zaya_train.train.identity import Identity, record_identity
from zaya_train.train.loop import load_summary
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
        "memory_bytes": 10**9,
        "stream_rms": [0.5, 1.0, 2.0, 4.0],
        "eda_gain": [1.1, 0.9],
        "balancing_bias": [[0.01, -0.01, -1.0]] * layers,
        "memory_bytes_ranks": [10**9 // 2, 10**9],
        "drawn_rows": {"text": phase_step, "sums": 3 * phase_step},
    }


def write_attempt(run_dir: Path, first: int, last: int, shift: float = 0.0) -> None:
    with MetricsWriter(run_dir, enabled=True) as metrics:
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
    with MetricsWriter(run_dir, enabled=True) as metrics:
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


def data_of(text: str) -> dict[str, Any]:
    """What the page's script draws."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_needs_nothing_from_outside(finished: tuple[Path, str]) -> None:
    output, text = finished
    page = Page(text)
    assert not page.tags & {"iframe", "object", "embed"}
    outside = [link for link in page.links if re.match(r"[a-z]+:", link)]
    assert all(link.startswith("data:") for link in outside)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not re.search(r"<script[^>]* src", text)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|importScripts|sendBeacon)\b", text)
    for link in set(page.links) - set(outside):
        assert (output.parent / unquote(link)).exists(), link


def test_the_page_says_what_ran_where_and_in_which_units(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "folder")
    versions = {"code": "c0de", "torch": "2.0", "device": "a <card>"}
    for attempt, ranks in ((1, 8), (2, 16)):
        identity = Identity(math_hash="abcd", config={}, world_size=ranks, versions=versions)
        record_identity(run_dir, attempt, 0, identity)
    (run_dir / "config.json").write_text(json.dumps({"run": {"name": "mine"}}))
    text = report([run_dir], tmp_path / "report.html").read_text()
    said = "run.name mine | 16 ranks on a &lt;card&gt; | torch 2.0 | code c0de | math abcd"
    assert text.count(said) == 1
    assert "<b>Memory <small>GB</small></b>" in text and "<b>Loss <small>nats</small></b>" in text
    assert "<b>Learning rate</b>" in text


def test_every_section_is_there_once(finished: tuple[Path, str]) -> None:
    output, text = finished
    ids = Page(text).ids
    assert len(ids) == len(set(ids))
    charts = {"loss", "learning_rate", "grad_norm", "supervised", "throughput", "seconds"}
    charts |= {"goodput", "memory", "balance", "violation", "mixture", "stream", "eda"}
    heat = {"load_map", "bias_map", "stream_map", "eda_map"}
    tables = {"phases", "mixture-table", "time", "restarts", "incidents", "checkpoints"}
    assert charts | heat | tables | {"exact-match", "files"} <= set(ids)
    assert set(Page(text).figures) == charts | heat
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert not list(output.parent.rglob("*.tmp"))


def test_the_chart_library_comes_with_its_licence(finished: tuple[Path, str]) -> None:
    assert "Permission is hereby granted" in finished[1] and "var uPlot=" in finished[1]


def test_curves_are_the_rows_that_stand(finished: tuple[Path, str]) -> None:
    (run,) = data_of(finished[1])["runs"]
    (loss, *held_out) = run["panels"]["loss"]
    assert loss["x"] == list(range(1, 61))
    expected = [None if step == 7 else pytest.approx(5 / step, rel=1e-4) for step in range(1, 61)]
    assert loss["lines"][0]["y"] == expected
    assert [table["lines"][0]["label"] for table in held_out] == [
        "held out: text",
        "held out: sums",
    ]
    assert run["phases"] == [["core", 0.5, 30.5], ["long", 30.5, 60.5]]
    assert run["restarts"] == [20.5, 20.5] and run["checkpoints"] == [10, 20, 30, 40, 50, 60]
    (mixture,) = run["panels"]["mixture"]
    assert [line["label"] for line in mixture["lines"]] == ["sums", "text"]
    assert set(mixture["lines"][0]["y"]) == {0.75}
    (stream,) = run["panels"]["stream"]
    assert stream["x"] == [0, 1, 2, 3] and stream["lines"][-1]["y"] == [0.5, 1, 2, 4]
    (eda,) = run["panels"]["eda"]
    assert eda["x"] == [1, 2]


def test_heat_maps_hold_what_was_recorded(finished: tuple[Path, str]) -> None:
    (run,) = data_of(finished[1])["runs"]
    load = run["maps"]["load_map"]
    assert (load["layers"], load["classes"], load["first"], load["last"]) == (3, 3, 0.5, 60.5)
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(load["png"]))))
    assert grey.shape == (9, 60)
    told = load["low"] + (grey[:, 0] - 1.0) / 254 * (load["high"] - load["low"])
    even = np.log2(np.array([0.5, 0.3, 0.2] * 3) * 3)
    assert np.allclose(told, even, atol=4 / 254)


def test_steps_whose_rows_were_passed_over_draw_no_collapse(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        metrics.write("start", step=0, **LAUNCH)
        for step in range(1, 7):
            values = step_values(step, math.nan if step in (3, 4) else 1.0)
            if step in (3, 4):
                values |= load_summary(torch.zeros(3, 3, dtype=torch.float64), 2)
                values["stream_rms"] = [math.nan] * 4
            metrics.write("step", **values)
    assert load_run(tmp_path).matrix("load")[0].tolist() == [1, 2, 5, 6]
    page = report([tmp_path], tmp_path / "report.html").read_text()
    (run,) = data_of(page)["runs"]
    (balance,) = run["panels"]["balance"]
    assert [line["y"][2:4] for line in balance["lines"]] == [[None, None]] * 2
    assert run["panels"]["violation"][0]["lines"][0]["y"] == [0.5, 0.5, None, None, 0.5, 0.5]
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(run["maps"]["load_map"]["png"]))))
    assert all(len(set(row)) == 1 for row in grey.tolist())


def test_goodput_counts_only_steps_that_stand(tmp_path: Path) -> None:
    row = {"attempt": 1, "step": 0, **LAUNCH}
    rows = [{"kind": "start", "wall_time": 100.0, **row}]
    rows += [written(1, 1, 101.0), written(2, 1, 102.0), written(3, 1, 103.0)]
    rows += [{"kind": "resume", "wall_time": 110.0, **row, "attempt": 2, "step": 1}]
    rows += [written(2, 2, 112.0), written(3, 2, 113.0)]
    text = "".join(json.dumps(each) + "\n" for each in rows)
    (tmp_path / METRICS_FILE).write_text(text)
    spent = load_run(tmp_path).spent
    # Three steps of half a second stand, two were done again; 7 s passed between the attempts.
    assert spent.wall_seconds == 13.0 and spent.between_seconds == 7.0
    assert spent.standing_seconds == 1.5 and spent.redone_seconds == 1.0
    assert spent.other_seconds == pytest.approx(6.0 - 2.5)
    assert spent.goodput == pytest.approx(1.5 / 13.0)


def written(step: int, attempt: int, wall_time: float) -> dict[str, Any]:
    return {"kind": "step", "attempt": attempt, "wall_time": wall_time, **step_values(step, 1.0)}


def test_incidents_are_told_without_a_torn_one(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    record = {"wall_time": 1.0, "attempt": 1, "kind": "skipped_step", "step": 7, "phase": "core"}
    record |= {"reason": "gradient not finite", "action": "skipped", "grad_norm": "NaN"}
    (run_dir / "incidents.jsonl").write_text(json.dumps(record) + '\n{"kind":"sk')
    text = report([run_dir], tmp_path / "report.html").read_text()
    assert data_of(text)["runs"][0]["incidents"] == [7]
    cells = Page(text).cells
    at = cells.index("skipped step")
    assert cells[at + 2 : at + 7] == ["7", "core", "gradient not finite", "skipped", "nan"]
    no_record = json.dumps({"wall_time": 2.0, "kind": "hang"})
    torn = f'{{"kind":"sk\n{no_record}\n[1]\n{json.dumps(record)}\n'.encode() + b"\xff\n"
    (run_dir / "incidents.jsonl").write_bytes(torn)
    text = report([run_dir], tmp_path / "report.html").read_text()
    assert data_of(text)["runs"][0]["incidents"] == [7]
    assert "4 unreadable lines in incidents*.jsonl" in text
    (run_dir / "incidents.jsonl").write_text("no\n")
    assert "1 unreadable lines" in report([run_dir], tmp_path / "report.html").read_text()


def test_tables_tell_the_rows_that_stand(finished: tuple[Path, str]) -> None:
    cells = Page(finished[1]).cells
    core = sum(5.0 / step for step in range(11, 31)) / 20
    long = sum(5.0 / step for step in range(41, 61)) / 20
    at = cells.index("core")
    expected = ["1 to 30", "30 K", f"{core:.4g}", "0.2", f"{7 / 30:.4g}", "0.5", "2 K"]
    assert cells[at : at + 8] == ["core", *expected]
    at = cells.index("long")
    assert cells[at : at + 4] == ["long", "31 to 60", "30 K", f"{long:.4g}"]
    at = cells.index("sums", cells.index("family"))
    assert cells[at : at + 3] == ["sums", "0 of 10", "9 of 10"]
    assert cells.count("resume") == 2
    assert "checkpoints/step-60 (3 MB)" in cells
    at = cells.index("sums", cells.index("realised"))
    assert cells[at : at + 4] == ["sums", "", "75.00 %", "90"]
    assert "90.0 %" in finished[1]


def test_a_phase_ends_where_it_ended_though_that_step_was_not_logged(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        metrics.write("start", step=0, **LAUNCH)
        for step in range(1, 61):
            phase = PHASES[(step - 1) // STEPS_PER_PHASE]
            if step % 8 == 0:  # logging.every_steps
                metrics.write("step", **step_values(step, 1.0))
            if step % STEPS_PER_PHASE == 0:
                metrics.write("eval", step=step, phase=phase, losses={"text": step / 10})
                ended = {"step": step, "tokens": 1000 * step}
                metrics.write("phase", name=phase, event="end", **ended)
    run = load_run(tmp_path)
    spans = [(p.first_step, p.last_step, p.tokens, p.validation["text"]) for p in run.phases]
    assert spans == [(0, 30, 30_000, 3.0), (30, 60, 30_000, 6.0)]
    page = report([tmp_path], tmp_path / "report.html").read_text()
    assert "<strong>60 so far</strong>" in page and "<strong>60 K</strong>" in page


def test_sampled_answers_of_the_best_model_are_shown(finished: tuple[Path, str]) -> None:
    assert "<h3>Sampled answers, trained</h3>" in finished[1]
    assert finished[1].count("<details>") == 1
    assert "right: 1 &lt; 2?" in finished[1] and "&lt;think&gt;so&lt;/think&gt;yes" in finished[1]


def test_equal_runs_give_equal_pages(finished: tuple[Path, str]) -> None:
    output, text = finished
    again = report([output.parent], output)
    # The report is now listed among the files; the rest is the same.
    strip = re.compile(r"<h2>Where everything lies</h2>.*", flags=re.DOTALL)
    assert strip.sub("", again.read_text()) == strip.sub("", text)


def test_a_live_run_with_a_torn_line_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    write_attempt(tmp_path / "live", 0, 1)
    with (tmp_path / "live" / METRICS_FILE).open("a") as file:
        file.write('{"kind":"step","st')
    text = report([tmp_path / "live"], tmp_path / "report.html").read_text()
    assert "1 so far" in text
    assert "exact-match" not in Page(text).ids
    assert data_of(text)["runs"][0]["panels"]["loss"][0]["x"] == [1]


def test_shares_of_what_devices_can_are_drawn_where_rows_have_them(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        metrics.write("start", step=0, **LAUNCH)
        for step in (1, 2):
            shares = {"flops": 1e9, "mfu": 0.25, "mfu_measured": 0.5 * step}
            metrics.write("step", **step_values(step, 1.0) | shares)
    (tmp_path / "config.json").write_text("{}")
    text = report([tmp_path], tmp_path / "report.html").read_text()
    (compute,) = data_of(text)["runs"][0]["panels"]["compute"]
    assert {line["label"]: line["y"] for line in compute["lines"]} == {
        "MFU, %": [25, 25],
        "of a plain product, %": [50, 100],
    }


def test_a_z_loss_has_a_chart_of_its_own(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        metrics.write("start", step=0, **LAUNCH)
        for step in (1, 2):
            metrics.write("step", **step_values(step, 1.0) | {"z_loss": 0.25 / step})
    (tmp_path / "config.json").write_text("{}")
    panels = data_of(report([tmp_path], tmp_path / "report.html").read_text())["runs"][0]["panels"]
    assert panels["z_loss"][0]["lines"][0]["y"] == [0.25, 0.125]
    assert len(panels["loss"][0]["lines"]) == 2


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    text = report(runs, tmp_path / "both.html").read_text()
    figures = Page(text).figures
    assert figures.count("loss") == 1
    assert [run["name"] for run in data_of(text)["runs"]] == ["one", "two"]
    assert {"one-phases", "two-phases"} <= set(Page(text).ids)
    assert Page(text).cells.count("core") == 2 * 3  # phases, and two sources of the mixture
    (tmp_path / "elsewhere").mkdir()
    twin = write_run(tmp_path / "elsewhere" / "one")
    with pytest.raises(DataError, match="different directory names, got one, one"):
        report([runs[0], twin], tmp_path / "twins.html")


def test_names_are_escaped(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a<b>&'\"c<!--<script>")
    text = report([run_dir], tmp_path / "report.html").read_text()
    assert "<b>&" not in text and "a&lt;b&gt;&amp;" in text


def test_links_lead_to_files_of_any_name(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    names = ["javascript:alert(1)", "a#b", "who?", "50%25", "two words", "a&b"]
    for name in names:
        (run_dir / name).write_text(name)
    links = Page(report([run_dir], run_dir / "report.html").read_text()).links
    targets = [urlsplit(link) for link in links if not link.startswith("data:")]
    assert not any(target.scheme or target.query or target.fragment for target in targets)
    assert set(names) <= {unquote(target.path) for target in targets}


@pytest.mark.parametrize("content", [None, "", "start"])
def test_a_run_without_steps_is_an_error_that_names_the_file(
    tmp_path: Path, content: str | None
) -> None:
    if content == "start":
        MetricsWriter(tmp_path, enabled=True).write("start", step=0, **LAUNCH)
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
    with MetricsWriter(tmp_path, enabled=True) as metrics:
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
    rows = 5 * MAX_MATRIX_ROWS
    row = {"kind": "step", "wall_time": 0.0, "attempt": 1, **step_values(1, 1.0)}
    with (tmp_path / METRICS_FILE).open("w") as file:
        for step in range(1, rows + 1):
            file.write(json.dumps(row | {"step": step}) + "\n")
    run = load_run(tmp_path)
    steps, loads = run.matrix("load")
    assert len(run.steps) == rows
    assert MAX_MATRIX_ROWS <= len(steps) < 2 * MAX_MATRIX_ROWS and loads.shape[1:] == (3, 3)
    assert set(np.diff(steps)) == {4.0} and steps[0] == 1
    assert run.matrix("balancing_bias")[1].shape == loads.shape


def test_thinning_keeps_spikes_of_every_line() -> None:
    y, z = np.sin(np.arange(100_000) / 3000), np.cos(np.arange(100_000) / 500)
    y[12_345], y[54_321], y[77_777], z[31_415] = 50.0, -40.0, np.nan, 9.0
    kept = extremes([y, z], 300)
    assert len(kept) <= 1_202 and np.all(np.diff(kept) > 0)
    assert {12_345, 54_321, 31_415, 0, 99_999} <= set(kept.tolist())
    assert extremes([y[:5]], 300).tolist() == [0, 1, 2, 3, 4]
    assert len(extremes([np.full(2_000, np.nan)], 300)) == 2


def test_numbers_of_the_page_are_short_and_json() -> None:
    told = numbers(np.array([1.23456789, np.nan, np.inf, 3.0, 1e-9, 123456.7]))
    assert told == [1.2346, None, None, 3, 1e-9, 123460.0]


def test_columns_of_a_map_are_means_of_equal_stretches() -> None:
    steps = np.array([1.0, 2.0, 3.0, 4.0])
    values = np.arange(4.0).reshape(4, 1, 1)
    assert average_over_time(steps, values, 2).ravel().tolist() == [0.5, 2.5]
    assert average_over_time(steps, values, 9).ravel().tolist() == [0.0, 1.0, 2.0, 3.0]
    values[[1, 2, 3]] = np.nan
    told = average_over_time(steps, values, 2).ravel()
    assert told[0] == 0.0 and np.isnan(told[1])


def test_smooth_is_an_unbiased_running_mean() -> None:
    constant = smooth(np.array([3.0, 3.0, np.nan, 3.0]), span=10)
    assert np.allclose(constant, 3.0)
    # span 3: weights 1/2, so the second value is (0.5 * 1 + 4) / 1.5
    assert np.allclose(smooth(np.array([1.0, 4.0]), span=3), [1.0, 3.0])
    assert np.isnan(smooth(np.array([np.nan, 1.0]), span=3)[0])
