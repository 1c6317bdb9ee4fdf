"""The tables and cards of a report, as HTML."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from zaya_train.config.errors import ConfigError, DataError
from zaya_train.tools.plan_against import cells, forecasts
from zaya_train.tools.router import (
    LEFT_OUT,
    LEGEND,
    NO_TRACE,
    REPLAY_HEAD,
    STATE_HEAD,
    cockpit,
    newest_steps,
    replay_cells,
    state_cells,
)
from zaya_train.train.identity import RUN_FILE, read_attempts

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from zaya_train.tools.report_data import RunData

MAX_ANSWERS = 12
MAX_ROWS = 30  # of incidents and checkpoints, the newest

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
    "incidents.jsonl": "every skipped step, with the rows and norms that explain it",
    "ledger.jsonl": "which rows made each step",
    "status.json": "what the supervisor sees, once every few seconds",
}


def cards_html(run: RunData) -> str:
    """The run in a few numbers."""
    last = run.steps[-1]
    seconds = last["wall_time"] - run.launches[0]["wall_time"] if run.launches else 0.0
    cards = [
        ("steps", f"{run.phases[-1].last_step:,}" + ("" if run.done else " so far")),
        ("tokens", count(sum(phase.tokens for phase in run.phases))),
        ("final loss", f"{run.phases[-1].final_loss:.4g}"),
        ("tokens / s, median", count(run.phases[-1].tokens_per_second)),
        ("wall time", duration(seconds)),
        ("resumes", str(max(0, len(run.launches) - 1))),
        ("goodput", f"{100 * run.spent.goodput:.1f} %"),
        ("incidents", str(len(run.incidents))),
    ]
    cards += [
        (f"exact match, {evaluation.name}", f"{100 * evaluation.overall.share:.1f} %")
        for evaluation in run.evaluations
    ]
    body = "".join(
        f'<div class="card"><span>{escape(label)}</span><strong>{escape(value)}</strong></div>'
        for label, value in cards
    )
    return f'{_about_html(run)}<div class="cards">{body}</div>'


def _about_html(run: RunData) -> str:
    """What the newest attempt is: its configuration's name, ranks, device, versions; nothing of a
    run that kept no manifest."""
    attempts = read_attempts(run.run_dir) if (run.run_dir / RUN_FILE).is_file() else []
    if not attempts:
        return ""
    newest = attempts[-1]
    versions = newest.get("versions", {})
    name = run.config.get("run", {}).get("name", run.name)
    facts = [
        f"run.name {name}",
        f"{newest.get('world_size')} ranks on {versions.get('device')}",
        f"torch {versions.get('torch')}",
        f"code {versions.get('code')}",
        f"math {newest['math_hash']}",
    ]
    return f'<p class="about">{escape(" | ".join(facts))}</p>'


def run_html(run: RunData, base: Path, several: bool) -> str:
    """Everything of one run that is no curve; links are relative to `base`."""
    sections: list[tuple[str, str, str]] = [
        ("phases", "Phases", _phase_table(run)),
        ("forecast", "Forecast and measured", _forecast_table(run)),
        ("mixture-table", "Data mixture", _mixture_table(run)),
        ("time", "Where the wall time went", _time_table(run)),
        ("router", "Routers", _router_html(run)),
        ("restarts", "Starts and resumes", _launch_table(run)),
        ("incidents", "Incidents", _incident_table(run)),
        ("checkpoints", "Checkpoints", _checkpoint_table(run)),
    ]
    if run.evaluations:
        sections.append(("exact-match", "Exact match", _evaluation_table(run) + _answers_html(run)))
    sections.append(("files", "Where everything lies", _file_table(run, base)))
    prefix = f"{run.name}-" if several else ""
    parts = [
        f'<section id="{escape(prefix + name, quote=True)}"><h2>{title}</h2>{body}</section>'
        for name, title, body in sections
    ]
    if not several:
        return "\n".join(parts)
    return (
        f'<details class="run"><summary>{escape(run.name)}</summary>{cards_html(run)}'
        + "\n".join(parts)
        + "</details>"
    )


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
                count(phase.tokens),
                f"{phase.final_loss:.4g}",
                *("" if loss is None else f"{loss:.4g}" for loss in losses),
                f"{phase.step_seconds:.3g}",
                count(phase.tokens_per_second),
            ]
        )
    return _table(head, rows)


def _forecast_table(run: RunData) -> str:
    """What the planner said of each phase, and what came (docs/planner.md)."""
    found = forecasts([*run.phase_rows, *run.steps])
    if not found:
        return "<p>This run was made before runs had forecasts.</p>"
    head = ["phase", "step, forecast", "measured", "", "peak memory, forecast", "measured", "by"]
    rows = [[one.phase, *cells(one), one.source] for one in found]
    return _table(head, [[escape(cell) for cell in row] for row in rows])


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
    return f"<h3>Sampled answers, {escape(best.name)}</h3>{''.join(blocks)}" if blocks else ""


def _mixture_table(run: RunData) -> str:
    """What the configuration asked for beside what was drawn, phase by phase."""
    asked = run.config.get("plan", {}).get("phases", {})
    rows = []
    for name, drawn in _drawn(run).items():
        total = sum(drawn.values())
        weights: dict[str, float] = asked.get(name, {}).get("mixture") or {}
        whole = sum(weights.values()) or 1.0
        rows += [
            [
                escape(name),
                escape(source),
                f"{100 * weights[source] / whole:.2f} %" if source in weights else "",
                f"{100 * count / total:.2f} %" if total else "",
                f"{count:,}",
            ]
            for source, count in drawn.items()
        ]
    if not rows:
        return "<p>Not recorded by the version that made this run.</p>"
    return _table(["phase", "source", "asked", "realised", "rows"], rows)


def _drawn(run: RunData) -> dict[str, dict[str, int]]:
    """Phase -> rows by source, of the newest row that tells."""
    drawn = {row["phase"]: row["drawn_rows"] for row in run.steps if "drawn_rows" in row}
    ends = {row["name"]: row["drawn_rows"] for row in run.phase_rows if "drawn_rows" in row}
    return {**drawn, **ends}


def _time_table(run: RunData) -> str:
    spent = run.spent
    parts = [
        ("steps that stand (goodput)", spent.standing_seconds),
        ("of these: waiting for data", spent.data_seconds),
        ("steps done again after a restart or roll back", spent.redone_seconds),
        ("held up by checkpoints", spent.saving_seconds),
        ("start-up, evaluation, logging", spent.other_seconds),
        ("between attempts", spent.between_seconds),
        ("wall time", spent.wall_seconds),
    ]
    whole = spent.wall_seconds or 1.0
    rows = [[name, duration(part), f"{100 * part / whole:.1f} %"] for name, part in parts]
    return _table(["", "time", "share"], rows)


def _router_html(run: RunData) -> str:
    """The cockpit of `zaya router`."""
    if not run.config:
        return "<p>The run kept no configuration, which has the gains.</p>"
    try:
        rows = newest_steps(run.run_dir)
        if not rows:
            return "<p>No step was applied yet.</p>"
        seen = cockpit(run.run_dir, rows)
    except (ConfigError, DataError) as error:  # the rest of the page stands without it
        return f"<p>Not shown: {escape(str(error))}</p>"
    words = "".join(f"<li>{escape(line)}</li>" for line in seen.words)
    states = _table(STATE_HEAD, [map(escape, state_cells(state)) for state in seen.states])
    states += f"<p>{escape(LEGEND)}</p>"
    if not seen.tried:
        return f"{states}<ul>{words}</ul><p>{escape(NO_TRACE)}</p>"
    first, last = seen.traced
    replays = [map(escape, replay_cells(each, seen.num_experts)) for each in seen.tried]
    return (
        f"{states}<ul>{words}</ul><h3>What if: steps {first:,} to {last:,} under other gains</h3>"
        "<p>The first row is as recorded; means over the later half of the steps. moved: share of "
        "the sampled choices. Weights learn from where tokens go, which a replay cannot tell.</p>"
        f"{_table(REPLAY_HEAD, replays)}"
        + (f"<p>{seen.left_out} {LEFT_OUT}</p>" if seen.left_out else "")
    )


def _launch_table(run: RunData) -> str:
    rows = []
    for row in run.launches:
        changes = row.get("config_changes") or {}
        words = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())
        if "rolled_back" in row:
            words = "rolled back; passes over rows {} to {}".format(*row["rolled_back"])
        rows.append(
            [
                escape(row["kind"]),
                _clock(row["wall_time"]),
                f"{row['step']:,}",
                str(row["world_size"]),
                escape(str(row["device"])),
                f"<code>{escape(str(row['config_hash'])[:12])}</code>",
                f'<span class="words">{escape(words)}</span>',
            ]
        )
    head = ["", "when (UTC)", "at step", "ranks", "device", "configuration", "changed"]
    return _table(head, rows)


def _incident_table(run: RunData) -> str:
    failures = [
        {**row, "kind": "save failed", "action": f"number {row['in_a_row']} in a row"}
        for row in run.save_failures
    ]
    rows: list[dict[str, Any]] = sorted([*run.incidents, *failures], key=lambda r: r["wall_time"])
    torn = unreadable_words(run.unreadable_incidents)
    told = f"<p>{torn}</p>" if torn else ""
    if not rows:
        return told or "<p>None.</p>"
    cells = [
        [
            escape(str(row.get("kind", "")).replace("_", " ")),
            _clock(row["wall_time"]),
            f"{row['step']:,}",
            escape(str(row.get("phase", ""))),
            escape(str(row.get("reason", ""))),
            escape(str(row.get("action", ""))),
            f"{row['grad_norm']:.4g}" if "grad_norm" in row else "",
            f"{row['norm_limit']:.4g}" if "norm_limit" in row else "",
        ]
        for row in rows[-MAX_ROWS:]
    ]
    head = ["", "when (UTC)", "step", "phase", "reason", "action", "gradient norm", "limit"]
    return told + _newest(len(rows)) + _table(head, cells)


def unreadable_words(lines: int) -> str:
    """What is said of lines of the incident files that are no records; empty for none."""
    return f"{lines} unreadable lines in incidents*.jsonl, as a killed writer leaves" * bool(lines)


def _checkpoint_table(run: RunData) -> str:
    if not run.checkpoints:
        return "<p>None yet.</p>"
    rows = [
        [
            f"{row['step']:,}",
            _clock(row["wall_time"]),
            f"<code>{escape(str(row['path']))}</code>",
            f"{count(row['bytes'])}B",
            duration(row["seconds"]),
            f"{row['blocked_seconds']:.3g} s" if "blocked_seconds" in row else "",
        ]
        for row in run.checkpoints[-MAX_ROWS:]
    ]
    head = ["step", "when (UTC)", "path", "size", "took", "held training up"]
    return _newest(len(run.checkpoints)) + _table(head, rows)


def _newest(total: int) -> str:
    return f"<p>The newest {MAX_ROWS} of {total:,}.</p>" if total > MAX_ROWS else ""


def _clock(wall_time: float) -> str:
    return datetime.fromtimestamp(wall_time, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")


def _file_table(run: RunData, base: Path) -> str:
    rows = [["run directory", _link(run.run_dir, base, str(run.run_dir.resolve()))]]
    if run.checkpoints:
        newest = run.checkpoints[-1]
        words = f"{escape(str(newest['path']))} ({count(newest['bytes'])}B)"
        rows.append(["newest checkpoint", f"<code>{words}</code>"])
    for path in sorted(run.run_dir.iterdir()):
        words = _KNOWN_FILES.get(path.name, "")
        rows.append([_link(path, base, path.name), escape(words)])
    cells = "".join(
        f'<tr><td>{left}</td><td class="words">{right}</td></tr>' for left, right in rows
    )
    return f'<div class="scroll"><table>{cells}</table></div>'


def _link(path: Path, base: Path, text: str) -> str:
    # A file may be called `javascript:...`, `a#b` or `50%`: quoted, it is a path and nothing else.
    target = quote(os.path.relpath(path.resolve(), base.resolve()))
    return f'<a href="{escape(target, quote=True)}"><code>{escape(text)}</code></a>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    first = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{first}</tr>{body}</table></div>'


def count(number: float) -> str:
    """1234567 -> `1.23 M`."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """As people say it: `3 min 5 s`."""
    if 0 < seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
