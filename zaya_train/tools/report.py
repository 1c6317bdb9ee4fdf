"""`zaya report RUN...`: what happened in a run, on one page that needs no server and no network.

The page holds everything: styles, tables and the plots as SVG text whose greys are CSS variables,
so that it follows the reader's light or dark setting and prints on white. The same plots are
written as PNG files beside it.
"""

from __future__ import annotations

import io
import os
import re
from html import escape
from typing import TYPE_CHECKING

import matplotlib

from zaya_train import __version__
from zaya_train.config.errors import DataError
from zaya_train.runtime.files import write_bytes, write_text
from zaya_train.tools.report_data import RunData, load_run
from zaya_train.tools.report_figure import BAND, GRID, INK, MUTED, STYLE
from zaya_train.tools.report_plots import Plot, draw_plots

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PNG_DIR = "report"
PNG_DPI = 150
MAX_ANSWERS = 12

_KNOWN_FILES = {
    "metrics.jsonl": "every number on this page, one JSON row per event",
    "checkpoints": "verified checkpoints; training resumes from the newest",
    "evaluation": "exact-match results and the sampled answers",
    "export": "the model in Hugging Face format",
    "tensorboard": "the same curves for TensorBoard",
    "wandb": "the same curves for Weights & Biases; `wandb sync` uploads an offline run",
    "config.json": "the configuration as resolved",
    "configs": "the configuration of every attempt",
    "logs": "what every rank said",
    "tokenizer": "the tokenizer the data was made with",
    "data": "the prepared corpora",
    "report": "the plots of this page as PNG files",
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #65707d; --grid: #dfe3e8;
  --band: #eef1f6; --paper: #ffffff; --card: #fafbfc; --accent: #2f7ed8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --muted: #98a3b1; --grid: #333b46;
  --band: #222932; --paper: #14181d; --card: #1a1f26; --accent: #6aa8ee; } }
@media print { :root { color-scheme: light; --ink: #1c2430; --muted: #65707d; --grid: #dfe3e8;
  --band: #eef1f6; --paper: #ffffff; --card: #ffffff; } figure, table { break-inside: avoid; }
  main { max-width: none; padding: 0; } .plots { grid-template-columns: 1fr 1fr; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, figcaption { color: var(--muted); margin: .2rem 0; }
figcaption { font-size: .82rem; line-height: 1.4; }
figcaption b { display: block; color: var(--ink); font-size: .95rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: .5rem;
  padding: .55rem .8rem; }
.card span { display: block; color: var(--muted); font-size: .78rem; }
.card strong { font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.plots { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; padding: .8rem; border: 1px solid var(--grid); border-radius: .5rem;
  background: var(--card); min-width: 0; }
figure svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
figure svg image { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
td.words { text-align: left; white-space: normal; color: var(--muted); }
details { border-bottom: 1px solid var(--grid); padding: .35rem .6rem; font-size: .88rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; color: var(--muted); }
code { font-size: .85em; overflow-wrap: anywhere; }
a { color: var(--accent); }
footer { margin-top: 2.5rem; font-size: .8rem; color: var(--muted); }
"""


def report(run_dirs: list[Path], output: Path) -> Path:
    """Write the page to `output` and its plots to `report/*.png` beside it; returns `output`.

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
    plots = draw_plots(runs)
    page = _page(runs, plots, output.parent)
    for plot in plots:
        write_bytes(output.parent / PNG_DIR / f"{plot.name}.png", _png(plot))
    write_text(output, page)
    return output


def _png(plot: Plot) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        plot.figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="white")
    return buffer.getvalue()


def _svg(plot: Plot) -> str:
    """The figure as an SVG element that can stand beside others in one page."""
    buffer = io.StringIO()
    # The salt makes ids a function of the drawing, so equal runs give equal pages.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": plot.name}):
        plot.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (BAND, "band")):
        text = text.replace(color, f"var(--{variable})")
    # Every figure numbers its parts from one: prefix the ids and whatever points to them.
    text = re.sub(r'(\bid=")', rf"\1{plot.name}-", text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{plot.name}-", text)
    label = escape(plot.title, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _page(runs: Sequence[RunData], plots: Sequence[Plot], base: Path) -> str:
    title = escape(" / ".join(run.name for run in runs))
    figures = "\n".join(_figure_html(plot) for plot in plots)
    sections = "\n".join(_run_html(run, base, several=len(runs) > 1) for run in runs)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{_cards_html(runs[0]) if len(runs) == 1 else ""}
<div class="plots">
{figures}
</div>
{sections}
<footer>zaya-train {__version__}</footer>
</main>
</body>
</html>
"""


def _figure_html(plot: Plot) -> str:
    return (
        f'<figure id="{escape(plot.name, quote=True)}">'
        f"<figcaption><b>{escape(plot.title)}</b>{escape(plot.caption)}</figcaption>"
        f"{_svg(plot)}</figure>"
    )


def _cards_html(run: RunData) -> str:
    last = run.steps[-1]
    seconds = last["wall_time"] - run.launches[0]["wall_time"] if run.launches else 0.0
    cards = [
        ("steps", f"{last['step']:,}" + ("" if run.done else " so far")),
        ("tokens", _count(last["tokens"])),
        ("final loss", f"{run.phases[-1].final_loss:.4g}"),
        ("tokens / s, median", _count(run.phases[-1].tokens_per_second)),
        ("wall time", _duration(seconds)),
        ("resumes", str(max(0, len(run.launches) - 1))),
    ]
    cards += [
        (f"exact match, {evaluation.name}", f"{100 * evaluation.overall.share:.1f} %")
        for evaluation in run.evaluations
    ]
    body = "".join(
        f'<div class="card"><span>{escape(label)}</span><strong>{escape(value)}</strong></div>'
        for label, value in cards
    )
    return f'<div class="cards">{body}</div>'


def _run_html(run: RunData, base: Path, several: bool) -> str:
    heading = f"<h2>{escape(run.name)}</h2>" if several else ""
    cards = _cards_html(run) if several else ""
    parts = [heading, cards, "<h2>Phases</h2>", _phase_table(run)]
    if run.evaluations:
        parts += ["<h2>Exact match</h2>", _evaluation_table(run), _answers_html(run)]
    parts += ["<h2>Starts and resumes</h2>", _launch_table(run)]
    parts += ["<h2>Where everything lies</h2>", _file_table(run, base)]
    return "\n".join(part for part in parts if part)


def _phase_table(run: RunData) -> str:
    held_out = list(run.validation)
    head = ["phase", "steps", "tokens", "loss at end", *(f"held out: {n}" for n in held_out)]
    head += ["s / step", "tokens / s"]
    rows = []
    for phase in run.phases:
        losses = [phase.validation.get(name) for name in held_out]
        rows.append(
            [
                escape(phase.name),
                f"{phase.first_step + 1:,} to {phase.last_step:,}",
                _count(phase.tokens),
                f"{phase.final_loss:.4g}",
                *("" if loss is None else f"{loss:.4g}" for loss in losses),
                f"{phase.step_seconds:.3g}",
                _count(phase.tokens_per_second),
            ]
        )
    return _table(head, rows)


def _evaluation_table(run: RunData) -> str:
    families = sorted({name for item in run.evaluations for name in item.by_family})
    rows = []
    for family in [None, *families]:
        cells = [escape(family or "all families")]
        for evaluation in run.evaluations:
            score = evaluation.overall if family is None else evaluation.by_family.get(family)
            cells.append(f"{score.correct} of {score.total}" if score else "")
        rows.append(cells)
    return _table(["family", *(escape(item.name) for item in run.evaluations)], rows)


def _answers_html(run: RunData) -> str:
    """Sampled replies of the best evaluation, folded away."""
    best = run.evaluations[-1]
    blocks = [
        f"<details><summary>{'right' if answer.correct else 'wrong'}: {escape(answer.prompt)}"
        f"</summary><pre>{escape(answer.reply)}</pre><p>expected: "
        f"<code>{escape(answer.expected)}</code></p></details>"
        for answer in best.answers[:MAX_ANSWERS]
    ]
    return f"<h2>Sampled answers, {escape(best.name)}</h2>{''.join(blocks)}" if blocks else ""


def _launch_table(run: RunData) -> str:
    rows = [
        [
            escape(row["kind"]),
            f"{row['step']:,}",
            str(row["world_size"]),
            escape(str(row["device"])),
            f"<code>{escape(str(row['config_hash'])[:12])}</code>",
        ]
        for row in run.launches
    ]
    return _table(["", "at step", "ranks", "device", "configuration"], rows)


def _file_table(run: RunData, base: Path) -> str:
    rows = [["run directory", _link(run.run_dir, base, str(run.run_dir.resolve()))]]
    if run.checkpoints:
        newest = run.checkpoints[-1]
        words = f"{escape(str(newest['path']))} ({_count(newest['bytes'])}B)"
        rows.append(["newest checkpoint", f"<code>{words}</code>"])
    for path in sorted(run.run_dir.iterdir()):
        words = _KNOWN_FILES.get(path.name, "")
        rows.append([_link(path, base, path.name), escape(words)])
    cells = "".join(
        f'<tr><td>{left}</td><td class="words">{right}</td></tr>' for left, right in rows
    )
    return f'<div class="scroll"><table>{cells}</table></div>'


def _link(path: Path, base: Path, text: str) -> str:
    target = os.path.relpath(path.resolve(), base.resolve())
    return f'<a href="{escape(target, quote=True)}"><code>{escape(text)}</code></a>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    first = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{first}</tr>{body}</table></div>'


def _count(number: float) -> str:
    """1234567 -> `1.23 M`."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
