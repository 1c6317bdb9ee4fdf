"""`zaya report RUN...`: what happened in a run, on one page that needs no server and no network.

The page holds everything: styles, tables, the curves as JSON and the heat maps as grey pictures.
Curves are drawn by uPlot (MIT licence, its file lies in report_page), which is part of the page.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_train import __version__
from zaya_train.config.errors import DataError
from zaya_train.runtime.files import write_text
from zaya_train.tools.report_data import RunData, load_run
from zaya_train.tools.report_maps import maps, run_maps
from zaya_train.tools.report_panels import panels, run_panels
from zaya_train.tools.report_tables import cards_html, run_html

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS = Path(__file__).with_name("report_page")
MAX_MARKS = 100  # checkpoints and incidents drawn per run


def report(run_dirs: list[Path], output: Path) -> Path:
    """Write the page to `output` and return it.

    Several runs are laid over each other; the phase bands are the first one's. A run still going
    is shown as far as it is. Raises DataError naming the metrics or evaluation file that is
    missing, empty or malformed, before anything is written, and StorageError on I/O.
    """
    if not run_dirs:
        raise DataError("report: no run directory given")
    runs = [load_run(run_dir) for run_dir in run_dirs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise DataError(f"report: runs must have different directory names, got {', '.join(names)}")
    write_text(output, _page(runs, output.parent))
    return output


def page_data(runs: Sequence[RunData]) -> dict[str, Any]:
    """What the page's script draws."""
    drawn = [_run_data(run, len(runs)) for run in runs]
    used = {name for run in drawn for name in run["panels"]}
    mapped = {name for run in drawn for name in run["maps"]}
    return {
        "panels": [panel for panel in panels() if panel["id"] in used],
        "maps": [each for each in maps() if each["id"] in mapped],
        "runs": drawn,
    }


def _run_data(run: RunData, several: int) -> dict[str, Any]:
    skipped = [row["step"] for row in run.incidents]
    return {
        "name": run.name,
        "phases": [[p.name, p.first_step + 0.5, p.last_step + 0.5] for p in run.phases],
        "restarts": [row["step"] + 0.5 for row in run.launches[1:]],
        "checkpoints": _marks([row["step"] for row in run.checkpoints]),
        "incidents": _marks(skipped + [row["step"] for row in run.save_failures]),
        "panels": run_panels(run, several),
        "maps": run_maps(run, several),
    }


def _marks(steps: list[int]) -> list[int]:
    return steps if len(steps) <= MAX_MARKS else steps[:: -(-len(steps) // MAX_MARKS)]


def _page(runs: Sequence[RunData], base: Path) -> str:
    title = escape(" / ".join(run.name for run in runs))
    data = page_data(runs)
    tables = "\n".join(run_html(run, base, several=len(runs) > 1) for run in runs)
    # A name with `</script` or `<!--` in it would end the element, or never let it end.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    figures = "\n".join(_figure(each) for each in [*data["panels"], *data["maps"]])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{_part("uPlot.min.css")}{_part("page.css")}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<noscript><p>The curves need JavaScript; the tables do not.</p></noscript>
{cards_html(runs[0]) if len(runs) == 1 else ""}
<div id="runs"></div>
<div class="plots">
{figures}
</div>
{tables}
<footer>zaya-train {__version__}</footer>
</main>
<script id="data" type="application/json">{text}</script>
<script>/* uPlot, MIT licence:
{_part("LICENSE-uPlot")}*/
{_part("uPlot.iife.min.js")}</script>
<script>{_part("pictures.js")}{_part("page.js")}</script>
</body>
</html>
"""


def _figure(panel: dict[str, Any]) -> str:
    unit = f" <small>{escape(panel['unit'])}</small>" if panel["unit"] else ""
    return (
        f'<figure id="{panel["id"]}"><figcaption><b>{escape(panel["title"])}{unit}</b>'
        f'{escape(panel["caption"])}</figcaption><div class="plot"></div></figure>'
    )


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")
