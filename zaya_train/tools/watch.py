"""`zaya watch RUN`: a live run in a terminal, for ssh sessions.

Reads the end of metrics.jsonl and what is appended to it, status.json of `zaya supervise` where
there is one, and the incidents; writes nothing and asks the run for nothing.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zaya_train.config.errors import DataError
from zaya_train.planning.components import GB
from zaya_train.runtime.supervisor import STATUS_FILE
from zaya_train.tools.plan_against import against_forecast
from zaya_train.tools.report_data import read_incidents
from zaya_train.tools.report_tables import count, duration, unreadable_words
from zaya_train.tools.tail import Tail
from zaya_train.train.attempts import CONFIG_FILE, read_config
from zaya_train.train.metrics import METRICS_FILE, is_launch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console, RenderableType

RECENT = 50  # rows whose median is the rate
INCIDENTS_SHOWN = 3
LOGARITHMIC = ("loss", "grad_norm")
BLOCKS = "".join(map(chr, range(0x2581, 0x2589)))
PLAIN_BLOCKS = "_.-=+*#@"


def watch(run_dir: Path, console: Console, once: bool, every_seconds: float) -> None:
    """Show the run until it is done or the watcher presses Ctrl-C; one frame if `once`.

    DataError where there is no such directory, or a file of it is not what it should be.
    """
    if not run_dir.is_dir():
        raise DataError(f"watch: {run_dir} is no directory")
    tail = Tail(run_dir / METRICS_FILE)
    # Where nothing can be redrawn, Live shows its last frame alone, when the run has ended.
    if once or not console.is_terminal:
        console.print(frame(run_dir, tail.read(), console, time.time()))
    if once:
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        try:
            while True:
                rows = tail.read()
                live.update(frame(run_dir, rows, console, time.time()), refresh=True)
                if rows and rows[-1]["kind"] == "done":
                    return
                time.sleep(every_seconds)
        except KeyboardInterrupt:
            return


def frame(
    run_dir: Path, rows: Sequence[dict[str, Any]], console: Console, now: float
) -> RenderableType:
    """What the terminal shows at Unix time `now`."""
    name = run_dir.resolve().name
    steps = [row for row in rows if row["kind"] == "step"]
    parts: list[RenderableType] = [_state(run_dir, rows, now)]
    if steps:
        parts += [_progress(run_dir, steps), _curves(steps, rows, console)]
    parts.append(_incidents(run_dir, now))
    return Panel(Group(*parts), title=name, title_align="left")


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """`width` blocks from the lowest to the highest; of several values to a block the one furthest
    from the block before, so that spikes stay. What is not finite is a gap."""
    if not values:
        return ""
    size = max(1.0, len(values) / width)
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    out, last = [], statistics.median(finite) if finite else 0.0
    for index in range(min(width, len(values))):
        part = values[int(index * size) : max(int((index + 1) * size), int(index * size) + 1)]
        known = [v for v in part if math.isfinite(v)]
        if not known:
            out.append(" ")
            continue
        last = max(known, key=lambda v: abs(v - last))
        share = (last - low) / (high - low) if high > low else 0.5
        out.append(blocks[min(len(blocks) - 1, int(share * len(blocks)))])
    return "".join(out)


def _state(run_dir: Path, rows: Sequence[dict[str, Any]], now: float) -> Text:
    """Whether it lives, by the newest row and by what the supervisor sees."""
    text = Text()
    if not rows:
        return text.append(f"waiting for {METRICS_FILE}", style="yellow")
    newest = rows[-1]
    done = newest["kind"] == "done"
    text.append("done" if done else "newest row", style="green" if done else "")
    text.append(
        f" {duration(max(0.0, now - newest['wall_time']))} ago, attempt {newest['attempt']}"
    )
    launches = [row for row in rows if is_launch(row)]
    if launches:
        text.append(f", {launches[-1]['world_size']} ranks on {launches[-1]['device']}")
    status = _status(run_dir / STATUS_FILE)
    if status is not None:
        age = duration(max(0.0, now - status["wall_time"]))
        text.append(f"\nsupervisor, {age} ago: {status['state']}")
        if status["ranks"]:
            quiet = max(status["ranks"], key=lambda rank: rank["silent_seconds"])
            text.append(
                f"; quietest rank {quiet['rank']}: {quiet['silent_seconds']:.1f} s in "
                f"{quiet['phase'] or 'start-up'} of step {quiet['step']}"
            )
        if status["slow_ranks"]:
            text.append(f"; slow ranks {status['slow_ranks']}", style="yellow")
        if status["reason"]:
            text.append(f"; {status['reason']}", style="red")
    return text


def _status(path: Path) -> dict[str, Any] | None:
    """It is replaced as a whole, so it is JSON or not there."""
    try:
        status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a status file ({error})") from error
    return status


def _progress(run_dir: Path, steps: Sequence[dict[str, Any]]) -> RenderableType:
    """Step and phase, and what is left at the present rate."""
    last = steps[-1]
    words = Text(f"step {last['step']:,} | phase {last['phase']} | {count(last['tokens'])} tokens")
    path = run_dir / CONFIG_FILE
    phases = read_config(path)["plan"]["phases"] if path.exists() else {}
    total = sum(_phase_tokens(phase) for phase in phases.values())
    if not total:
        return words
    rate = _rate(steps)
    left = max(0, total - last["tokens"])
    words.append(f" of {count(total)}")
    if left and rate:
        words.append(f" | {duration(left / rate)} left at this rate")
    lines = Table.grid()
    lines.add_row(words)
    lines.add_row(ProgressBar(total=total, completed=last["tokens"], width=60))
    return lines


def _phase_tokens(phase: dict[str, Any]) -> int:
    """As trained: whole rows."""
    return int(-(-phase["tokens"] // phase["context_tokens"]) * phase["context_tokens"])


def _rate(steps: Sequence[dict[str, Any]]) -> float:
    """Tokens a second of the newest rows."""
    return statistics.median(row["tokens_per_second"] for row in steps[-RECENT:])


def _curves(
    steps: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], console: Console
) -> Table:
    utf = (console.encoding or "").lower().startswith("utf")
    blocks, width = BLOCKS if utf else PLAIN_BLOCKS, max(10, min(60, console.width - 46))
    table = Table.grid(padding=(0, 1))
    evals = [row for row in rows if row["kind"] == "eval"]
    held_out = ", ".join(f"{k} {v:.4f}" for k, v in evals[-1]["losses"].items()) if evals else ""
    last = steps[-1]
    memory = max(last.get("memory_bytes_ranks", [0]) + [last["memory_bytes"]])
    lines = [
        ("loss", "loss", f"{last['loss']:.4f}"),
        ("gradient norm", "grad_norm", f"{last['grad_norm']:.3g}"),
        ("tokens / s", "tokens_per_second", count(_rate(steps))),
        ("s / step", "step_seconds", f"{last['step_seconds']:.3g}"),
        ("load entropy", "load_entropy", f"{last['load_entropy']:.3f}"),
        ("MaxVio", "max_violation", f"{last['max_violation']:.2f}"),
        ("skip rate", "skip_rate", f"{last['skip_rate']:.2g}"),
    ]
    for label, key, value in lines:
        values = [float(row[key]) for row in steps]
        if key in LOGARITHMIC:
            values = [math.log(v) if v > 0 else math.nan for v in values]
        table.add_row(label, sparkline(values, width, blocks), value)
    table.add_row("held out", held_out, "")
    table.add_row("memory", f"peak {memory / GB:.2f} GB, the fullest rank", "")
    words = against_forecast(rows, last["phase"])
    if words:
        table.add_row("forecast", words, "")
    saves = [row for row in rows if row["kind"] == "checkpoint"]
    if saves:
        table.add_row("checkpoint", f"step {saves[-1]['step']:,}, {count(saves[-1]['bytes'])}B", "")
    return table


def _incidents(run_dir: Path, now: float) -> Text:
    found, unreadable = read_incidents(run_dir)
    text = Text(f"incidents: {len(found)}", style="red" if found else "dim")
    if unreadable:
        text.append(f"; {unreadable_words(unreadable)}", style="yellow")
    for record in found[-INCIDENTS_SHOWN:]:
        kind = str(record["kind"]).replace("_", " ")
        age = duration(max(0.0, now - record["wall_time"]))
        text.append(f"\n  step {record['step']:,}, {age} ago: {kind}: {record.get('reason', '')}")
    return text
