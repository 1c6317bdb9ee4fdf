"""Reports of real runs in a real browser: every section filled, nothing on the console, and still
small and whole for a hundred thousand steps.

Screenshots and figures are left in build/report.
"""

from __future__ import annotations

import base64
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.browser import DESK, PHONE, browser, console, open_report, resized, screenshot
from tests.helpers.paths import REPOSITORY
from tests.integration.runs import Launched, make_corpora, overrides_for, values_for
from zaya_train.tools.report import report
from zaya_train.train.metrics import METRICS_FILE, ROW_FIELDS, read_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from selenium.webdriver import Chrome

KEPT = REPOSITORY / "build" / "report"
STEP_CHARTS = {
    *("loss", "learning_rate", "grad_norm", "supervised", "throughput", "seconds", "compute"),
    *("goodput", "memory", "balance", "violation", "mixture"),
}
DEPTH_CHARTS = {"stream", "eda"}
MAPS = {"load_map", "bias_map", "stream_map", "eda_map"}
LAYER_CHARTS = {"load_map_layer", "bias_map_layer"}
TABLES = {
    "phases",
    "mixture-table",
    "time",
    "router",
    "restarts",
    "incidents",
    "checkpoints",
    "files",
}
MOST_BYTES = 5_000_000
SPIKE = 97.5
LONG_STEPS = 100_000


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen steps in two phases, the second by another process, some of them skipped by a guard
    that calls nearly everything a spike."""
    folder = tmp_path_factory.mktemp("report")
    changes = {
        "parallel.context_parallel_limit": 1,
        "guard": {"sigma": 0.01, "window_steps": 4, "most_skipped": 9},
        "checkpoint": {"every_steps": 2, "retry_seconds": 0.3},
    }
    corpora = make_corpora(folder / "corpus")
    words = overrides_for(values_for(folder / "run", corpora, changes))
    first = Launched([*words, "run.only_phase=short"], folder / "first")
    assert first.wait() == [0], first.output()
    again = Launched(words, folder / "second")
    assert again.wait() == [0], again.output()
    KEPT.mkdir(parents=True, exist_ok=True)
    return folder / "run"


@pytest.fixture(scope="module")
def page_of_run(real_run: Path) -> Path:
    return report([real_run], real_run / "report.html")


@pytest.fixture(scope="module")
def desk() -> Iterator[Chrome]:
    with browser(DESK) as opened:
        yield opened


def long_run(real: Path, folder: Path, steps: int = LONG_STEPS, seed: int = 0) -> Path:
    """The rows of `real` over and over under new step numbers, with one step's loss and norm
    SPIKE in the middle. Its curves mean nothing: it is there for its length."""
    rows = [json.loads(line) for line in (real / METRICS_FILE).read_text().splitlines()]
    launch, *_ = rows
    again = [row for row in rows if row["kind"] == "step"]
    folder.mkdir(parents=True)
    shutil.copy(real / "config.json", folder)
    shutil.copy(real / "incidents.jsonl", folder)
    with (folder / METRICS_FILE).open("w") as file:
        file.write(json.dumps(launch) + "\n")
        for step in range(1, steps + 1):
            row = {**again[(step + seed) % len(again)], "step": step, "attempt": 1}
            row |= {"wall_time": launch["wall_time"] + step, "phase": f"p{4 * step // (steps + 1)}"}
            if step == steps // 2 + seed:
                row |= {"loss": SPIKE, "grad_norm": SPIKE}
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
            if step % 1000 == 0:
                path = {"path": f"checkpoints/step-{step:08d}", "seconds": 1.0, "bytes": 1}
                file.write(json.dumps({**launch, "kind": "checkpoint", "step": step, **path}))
                file.write("\n")
    return folder


def filled(page: Chrome) -> dict[str, dict[str, Any]]:
    """Per chart: how many of its lines have a point, and the different colours inside its axes."""
    told: dict[str, dict[str, Any]] = page.execute_script("""
        const told = {};
        for (const { plot, id } of zaya.charts) {
          const { left, top, width, height } = plot.bbox;
          const pixels = new Uint32Array(
            plot.ctx.getImageData(left, top, width, height).data.buffer);
          const lines = plot.data.slice(1).map((y) => y.filter(Number.isFinite).length);
          const opaque = pixels.filter((word) => word >>> 24 === 255).length / pixels.length;
          told[id] = { colours: new Set(pixels).size, lines, opaque,
                       steps: Array.from(plot.data[0]) };
        }
        return told;""")
    return told


def check_quiet(told: dict[str, Any]) -> None:
    assert told["errors"] == []
    assert told["console"] == []


def test_every_section_is_filled_from_a_real_run(
    real_run: Path, page_of_run: Path, desk: Chrome
) -> None:
    told = open_report(desk, page_of_run)
    check_quiet(told)
    charts = filled(desk)
    assert set(charts) == STEP_CHARTS | DEPTH_CHARTS | MAPS | LAYER_CHARTS
    for name, chart in charts.items():
        assert all(points > 0 for points in chart["lines"]), name
        assert chart["colours"] > 3, name  # paper, grid, band
        assert (chart["opaque"] > 0.99) == (name in MAPS), name
    assert charts["loss"]["steps"] == list(range(1, 14))
    assert charts["stream"]["steps"] == [0, 1, 2] and charts["eda"]["steps"] == [1]
    for table in TABLES:
        cells = desk.execute_script(
            "return [...document.querySelectorAll(`#${arguments[0]} td`)].length", table
        )
        assert cells > 0, table
    words = desk.execute_script("return document.body.innerText")
    assert "skipped step" in words and "resume" in words and "step-00000013" in words
    screenshot(desk, KEPT / "desk.png")
    pdf = desk.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    (KEPT / "print.pdf").write_bytes(base64.b64decode(pdf))


def test_the_docs_name_every_field_of_a_real_run(real_run: Path) -> None:
    told = (REPOSITORY / "docs" / "report.md").read_text().partition("## Fields")[2]
    rows = [json.loads(line) for line in (real_run / METRICS_FILE).read_text().splitlines()]
    assert {row["kind"] for row in rows} == ROW_FIELDS.keys() - {"save_failed"}
    fields = {field for row in rows for field in row} | {*ROW_FIELDS["save_failed"], "mfu"}
    assert not [field for field in sorted(fields) if f"`{field}`" not in told]


def test_phase_rows_tell_the_tokens_at_the_end(real_run: Path) -> None:
    rows = read_metrics(real_run)
    at = {row["step"]: row["tokens"] for row in rows if row["kind"] == "step"}
    ends = [row for row in rows if row["kind"] == "phase" and row["event"] == "end"]
    assert [(row["name"], row["tokens"]) for row in ends] == [("short", at[8]), ("long", at[13])]


def test_paper_is_not_left_by_any_chart(page_of_run: Path, desk: Chrome) -> None:
    open_report(desk, page_of_run)
    resized(desk, (700, 990))
    desk.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    over = desk.execute_script("""
        dispatchEvent(new Event("beforeprint"));
        const over = zaya.charts.filter(({ plot, box }) => plot.width > box.clientWidth);
        return [over.map((chart) => chart.id), document.documentElement.scrollWidth];""")
    desk.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    resized(desk, DESK)
    assert over == [[], 700]


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page_of_run: Path) -> None:
    with browser(PHONE) as page:
        told = open_report(page, page_of_run)
        check_quiet(told)
        assert page.execute_script("return document.documentElement.scrollWidth") == PHONE[0]
        widths = page.execute_script("return zaya.charts.map(({ plot }) => plot.width)")
        assert len(widths) == 20 and all(250 < width < PHONE[0] for width in widths)
        screenshot(page, KEPT / "phone.png")


def test_zoom_moves_every_chart_over_steps(page_of_run: Path, desk: Chrome) -> None:
    open_report(desk, page_of_run)
    seen = desk.execute_script("""
        const of = (id) => zaya.charts.find((chart) => chart.id === id).plot;
        const depth = of("stream").scales.x.max;
        of("grad_norm").setScale("x", { min: 4, max: 9 });
        return new Promise((done) => requestAnimationFrame(() => setTimeout(() => done([
          ["loss", "memory", "load_map", "bias_map_layer"].map((id) =>
            [of(id).scales.x.min, of(id).scales.x.max]), depth === of("stream").scales.x.max]), 50)
        ));""")
    assert seen == [[[4, 9]] * 4, True]


def test_one_layer_is_chosen_by_hand(page_of_run: Path, desk: Chrome) -> None:
    told = open_report(desk, page_of_run)
    seen = desk.execute_script("""
        const lines = () => zaya.charts.find(({ id }) => id === "bias_map_layer").plot.data
          .slice(1).map((y) => Array.from(y));
        const before = lines();
        const select = document.getElementById("map-layer");
        select.value = "1";
        return select.onchange().then(() => [before, lines(), zaya.charts.length]);""")
    before, after, charts = seen
    assert before != after and len(before) == len(after) == 4 and charts == len(told["charts"])
    check_quiet({**told, "console": console(desk)})


def test_of_quick_choices_the_last_is_drawn_once(page_of_run: Path, desk: Chrome) -> None:
    told = open_report(desk, page_of_run)
    seen = desk.execute_script("""
        const select = document.getElementById("map-layer");
        const choices = ["1", "0", "1"].map((layer) => {
          select.value = layer;
          return select.onchange();
        });
        const boxes = () => [...document.querySelectorAll(".plot")];
        return Promise.all(choices).then(() => [
          boxes().map((box) => box.querySelectorAll(".uplot").length),
          zaya.charts.length, new Set(zaya.charts.map(({ id }) => id)).size]);""")
    boxes, charts, different = seen
    assert set(boxes) == {1} and len(boxes) == charts == different == len(told["charts"])
    check_quiet({**told, "console": console(desk)})


def test_cells_without_a_value_are_gaps_of_the_lines(
    real_run: Path, tmp_path: Path, desk: Chrome
) -> None:
    run_dir = long_run(real_run, tmp_path / "gaps", 40)
    rows = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    for row in rows[21:31]:
        row["balancing_bias"][0][1] = "NaN"
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    open_report(desk, report([run_dir], tmp_path / "gaps.html"))
    gaps = desk.execute_script("""
        const { data } = zaya.charts.find(({ id }) => id === "bias_map_layer").plot;
        const gaps = data.slice(1).map((y) => Array.from(y).filter((v) => v === null).length);
        return [gaps, data.slice(1).some((y) => Array.from(y).some(Number.isNaN))];""")
    assert gaps == [[0, 10, 0, 0], False]


def test_a_heat_map_has_the_marks_of_its_own_run(
    real_run: Path, tmp_path: Path, desk: Chrome
) -> None:
    runs = [long_run(real_run, tmp_path / f"run{number}", 60, number) for number in range(2)]
    open_report(desk, report(runs, tmp_path / "two.html"))
    # An incident is a filled triangle; the other run has as many at the same steps.
    filled, incidents = desk.execute_script("""
        const { plot } = zaya.charts.find(({ id }) => id === "load_map");
        const { fill } = CanvasRenderingContext2D.prototype;
        let filled = 0;
        plot.ctx.fill = function (...given) { filled += 1; return fill.apply(this, given); };
        plot.redraw(false);
        const { incidents } = JSON.parse(document.getElementById("data").textContent).runs[0];
        return new Promise((done) => setTimeout(() => done([filled, incidents.length]), 100));""")
    assert filled == incidents > 0


def test_a_hundred_thousand_steps_stay_small_and_keep_a_spike(
    real_run: Path, tmp_path: Path, desk: Chrome
) -> None:
    page = report([long_run(real_run, tmp_path / "long")], tmp_path / "long.html")
    assert page.stat().st_size < MOST_BYTES
    told = open_report(desk, page)
    check_quiet(told)
    seen = desk.execute_script(
        """
        return ["loss", "grad_norm"].map((id) => {
          const { data } = zaya.charts.find((chart) => chart.id === id).plot;
          return [data[0].length, data[1][data[0].indexOf(arguments[0])]];
        });""",
        LONG_STEPS // 2,
    )
    assert [value for _, value in seen] == [SPIKE, SPIKE]
    assert all(600 <= points <= 2_000 for points, _ in seen)
    figures = {"bytes": page.stat().st_size, "milliseconds": told["milliseconds"]}
    (KEPT / "long.json").write_text(json.dumps(figures))


def test_ten_runs_over_each_other_can_be_told_apart(
    real_run: Path, tmp_path: Path, desk: Chrome
) -> None:
    runs = [long_run(real_run, tmp_path / f"run{number}", 600, number) for number in range(10)]
    page = report(runs, tmp_path / "ten.html")
    assert page.stat().st_size < MOST_BYTES
    told = open_report(desk, page)
    check_quiet(told)
    seen = desk.execute_script("""
        const chips = [...document.querySelectorAll(".chip")];
        const visible = () => zaya.charts.filter(({ id }) => !id.includes("map")).map(({ plot }) =>
          new Set(plot.series.slice(1).filter((s) => s.show).map((s) => s.run)).size);
        const before = visible();
        chips[3].click();
        const strokes = new Set(chips.map((chip) => chip.style.getPropertyValue("--run")));
        return [chips.length, strokes.size, before, visible(), chips[3].ariaPressed];""")
    charts = len(STEP_CHARTS | DEPTH_CHARTS)
    assert seen == [10, 10, [10] * charts, [9] * charts, "false"]
    chosen = desk.execute_script("""
        const select = document.getElementById("map-run");
        select.value = "7";
        return select.onchange().then(() => filledRun = select.selectedOptions[0].textContent);""")
    assert chosen == "run7"
    check_quiet({**told, "console": console(desk)})
    screenshot(desk, KEPT / "ten-runs.png")
