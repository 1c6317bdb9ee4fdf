"""The curves of a report as plain data: which charts there are, and each run's lines in them.

Lines are thinned so that every bucket of a chart keeps the lowest and the highest value of each of
them: a spike of one step stays.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zaya_train.config.build import build
from zaya_train.config.errors import ConfigError
from zaya_train.config.schema import ModelConfig
from zaya_train.model.flops import matmul_flops_per_token
from zaya_train.planning.components import GB
from zaya_train.tools.report_data import MANY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zaya_train.tools.report_data import Array, RunData

BUCKETS = 300  # per chart; a phone shows about this many pixels, a desk twice as many
BUCKETS_OF_MANY = 120  # with more than MANY runs over each other
DIGITS = 5
SNAPSHOTS = 5  # of a profile over depth

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One chart."""

    id: str
    title: str
    caption: str
    unit: str
    log: bool = False
    zero: bool = False
    """The axis starts at zero."""
    depth: bool = False
    """Over layers instead of steps."""


PANELS = (
    Panel(
        "loss",
        "Loss",
        "Per supervised token. Faint: every logged step; full: running mean within the phase; "
        "dots: held-out losses. Bands are phases (of the first run), triangles at the bottom "
        "checkpoints, dashed lines restarts, red marks at the top incidents.",
        "nats",
        log=True,
    ),
    Panel("z_loss", "Z-loss", "Added to the loss above, per supervised token.", "nats", log=True),
    Panel("learning_rate", "Learning rate", "Peak values times schedule.", "", zero=True),
    Panel("grad_norm", "Gradient norm", "Global, before clipping.", "", log=True),
    Panel("supervised", "Supervised tokens", "Per step, over all ranks.", "tokens", zero=True),
    Panel("throughput", "Throughput", "Over all ranks.", "tokens / s", zero=True),
    Panel("seconds", "Time of a step", "And the part spent waiting for data.", "s", log=True),
    Panel(
        "compute",
        "Compute",
        "Share of what the devices can: of the data sheet's peak where it is known, and of a plain "
        "product measured at the start. Where rows have neither: GFLOP/s a rank in products with "
        "weights.",
        "",
        zero=True,
    ),
    Panel(
        "goodput",
        "Goodput",
        "Share of the wall time so far that went into steps that stand; restarts, lost steps, "
        "saves and evaluation take the rest.",
        "share",
        zero=True,
    ),
    Panel(
        "memory",
        "Memory",
        "Peak so far: of the process or device that writes the metrics, and of the ranks with "
        "the most and the least.",
        "GB",
        zero=True,
    ),
    Panel(
        "balance",
        "Load entropy and skip rate",
        "Entropy of the load over ln E, mean over layers (1 is even); share of tokens that skip "
        "the experts.",
        "share",
        zero=True,
    ),
    Panel(
        "violation",
        "Largest violation",
        "Excess of the busiest expert of the worst layer over its even share (MaxVio).",
        "",
        zero=True,
    ),
    Panel(
        "mixture",
        "Data mixture",
        "Share of this phase's rows that came from each source so far.",
        "share",
        zero=True,
    ),
    Panel(
        "stream",
        "Residual stream by depth",
        "Root mean square before the first layer (0) and behind each, at points in time.",
        "RMS",
        log=True,
        depth=True,
    ),
    Panel(
        "eda",
        "EDA gain by depth",
        "Mean learned weight of the router state of the layer before, at points in time.",
        "",
        depth=True,
    ),
)


def panels() -> list[dict[str, Any]]:
    """What the page is told about its charts."""
    return [asdict(panel) for panel in PANELS]


def run_panels(run: RunData, several: int) -> dict[str, list[dict[str, Any]]]:
    """Panel -> tables of one run, each {x, lines}; `several`: runs on the page."""
    buckets = BUCKETS if several <= MANY else BUCKETS_OF_MANY
    data: dict[str, list[dict[str, Any]]] = {}
    for panel, lines in _step_lines(run).items():
        kept = [line for line in lines if np.isfinite(line["y"]).any()]
        if kept:
            data[panel] = [_table(run.step, kept, buckets)]
    for name, (steps, losses) in run.validation.items():
        line = _line(f"held out: {name}", losses, points=True)
        data["loss"].append(_table(steps, [line], buckets))
    for panel, key, first in (("stream", "stream_rms", 0), ("eda", "eda_gain", 1)):
        lines = _profiles(run, key, 1 if several > 1 else SNAPSHOTS)
        if lines:
            layers = first + np.arange(len(lines[0]["y"]), dtype=np.float64)
            data[panel] = [_table(layers, lines, len(layers))]
    return data


def extremes(columns: Sequence[Array], buckets: int) -> np.ndarray:
    """Indices that keep the first and last row and every bucket's extremes of each column."""
    count = len(columns[0])
    if count <= 2 * buckets:
        return np.arange(count)
    kept = {0, count - 1}
    for bucket in np.array_split(np.arange(count), buckets):
        for column in columns:
            part = column[bucket]
            if np.isfinite(part).any():
                kept |= {int(bucket[np.nanargmin(part)]), int(bucket[np.nanargmax(part)])}
    return np.array(sorted(kept))


def smooth(y: Array, span: int) -> Array:
    """Exponential mean with weights that sum to one from the first point; non-finite ones wait."""
    keep = 1.0 - 2.0 / (span + 1.0)
    total, weight = 0.0, 0.0
    out = np.empty_like(y)
    for index, value in enumerate(y):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1.0
        out[index] = total / weight if weight else np.nan
    return out


def numbers(values: Array) -> list[float | int | None]:
    """For JSON: few digits, and null for what is not finite."""
    out: list[float | int | None] = []
    for value in values.tolist():
        if not np.isfinite(value):
            out.append(None)
        elif value == int(value) and abs(value) < 1e15:
            out.append(int(value))
        else:
            out.append(float(f"{value:.{DIGITS}g}"))
    return out


def _line(label: str, y: Array, **style: bool) -> dict[str, Any]:
    return {"label": label, "y": y, **style}


def _table(x: Array, lines: Lines, buckets: int) -> dict[str, Any]:
    # The infinite are no extreme: a line has to stay drawable.
    columns = [np.where(np.isfinite(line["y"]), line["y"], np.nan) for line in lines]
    chosen = extremes(columns, buckets)
    drawn = [
        {**line, "y": numbers(column[chosen])} for line, column in zip(lines, columns, strict=True)
    ]
    return {"x": numbers(x[chosen]), "lines": drawn}


def _step_lines(run: RunData) -> dict[str, Lines]:
    column = run.column
    loss = np.where(column("loss") > 0, column("loss"), np.nan)
    norm = np.where(column("grad_norm") > 0, column("grad_norm"), np.nan)
    waited = np.where(column("data_seconds") > 0, column("data_seconds"), np.nan)
    return {
        "loss": [_line("step", loss, faint=True), _line("mean", _smooth_by_phase(run, loss))],
        "z_loss": [_line("z-loss", column("z_loss"))],
        "learning_rate": [
            _line("Muon", column("muon_lr")),
            _line("AdamW", column("adamw_lr"), dash=True),
        ],
        "grad_norm": [_line("norm", norm)],
        "supervised": [_line("tokens", column("supervised_tokens"))],
        "throughput": [_line("tokens / s", column("tokens_per_second"))],
        "seconds": [
            _line("step", column("step_seconds")),
            _line("waiting for data", waited, dash=True),
        ],
        "compute": _compute(run),
        "goodput": [_line("goodput", goodput(run))],
        "memory": _memory(run),
        "balance": [
            _line("entropy", column("load_entropy")),
            _line("skip rate", column("skip_rate"), dash=True),
        ],
        "violation": [_line("MaxVio", column("max_violation"))],
        "mixture": _mixture(run),
    }


def _smooth_by_phase(run: RunData, loss: Array) -> Array:
    parts = []
    for phase in run.phases:
        part = loss[(run.step > phase.first_step) & (run.step <= phase.last_step)]
        parts.append(smooth(part, span=max(5, len(part) // 20)))
    return np.concatenate(parts)


def goodput(run: RunData) -> Array:
    """Per step row: seconds of standing steps over wall seconds, from the run's first row on."""
    wall = run.column("wall_time") - run.launches[0]["wall_time"] if run.launches else None
    if wall is None:
        return np.full(len(run.steps), np.nan)
    stride = np.diff(run.step, prepend=run.step[0] - 1)
    spent = np.cumsum(run.column("step_seconds") * stride)
    return np.minimum(spent / np.maximum(wall, 1e-9), 1.0)


def _compute(run: RunData) -> Lines:
    shares = {"MFU, %": run.column("mfu"), "of a plain product, %": run.column("mfu_measured")}
    known = [_line(name, 100 * s) for name, s in shares.items() if np.isfinite(s).any()]
    if known:
        return known
    try:
        model = build(ModelConfig, run.config["model"])
    except (KeyError, ConfigError):
        return []  # kept by an older version, or not at all
    flops = 3 * matmul_flops_per_token(model)
    ranks = {row["attempt"]: row["world_size"] for row in run.launches}
    world = np.array([ranks.get(row["attempt"], 1) for row in run.steps], dtype=np.float64)
    return [_line("GFLOP/s per rank", run.column("tokens_per_second") * flops / world / 1e9)]


def _memory(run: RunData) -> Lines:
    own = run.column("memory_bytes") / GB
    lines = [_line("writer", np.where(own > 0, own, np.nan))]
    pairs = [row.get("memory_bytes_ranks", [np.nan, np.nan]) for row in run.steps]
    least, most = np.array(pairs, dtype=np.float64).T / GB
    if np.nanmax(most, initial=0) > 0 and not np.array_equal(least, most):
        lines += [_line("rank with most", most, dash=True), _line("with least", least, dash=True)]
    return lines


def _mixture(run: RunData) -> Lines:
    names = sorted({name for row in run.steps for name in row.get("drawn_rows", {})})
    shares = {name: np.full(len(run.steps), np.nan) for name in names}
    for place, row in enumerate(run.steps):
        drawn: Mapping[str, int] = row.get("drawn_rows", {})
        total = sum(drawn.values())
        for name, rows in drawn.items():
            shares[name][place] = rows / total if total else np.nan
    return [_line(name, shares[name]) for name in names]


def _profiles(run: RunData, key: str, snapshots: int) -> Lines:
    """The last row's values over depth, and with more snapshots those of earlier ones."""
    steps, values = run.matrix(key)
    if not len(steps) or not values[-1].size:
        return []
    at = np.unique(np.linspace(0, len(steps) - 1, snapshots + 1)[1:].round().astype(int))
    return [_line(f"step {steps[i]:,.0f}", values[i], points=True) for i in at]
