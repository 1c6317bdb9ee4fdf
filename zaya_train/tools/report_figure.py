"""What the figures of a report share: colours, a step axis with the phases on it, thinned lines.

The four greys are the light theme's. In the HTML they are replaced by CSS variables, so one
drawing serves light, dark and paper (`report.py`); the line colours read on both backgrounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from zaya_train.tools.report_data import Array, RunData

INK, MUTED, GRID, BAND = "#1c2430", "#65707d", "#dfe3e8", "#eef1f6"
LINES = ("#2f7ed8", "#e07b39", "#2fa36b", "#9a6bd6", "#c9a227", "#d1567f", "#3aa6b9", "#8c7355")
ALARM = "#d9382f"
MAX_POINTS = 600  # per line; twice what a 5 inch figure can tell apart
WIDTH = 5.2  # inches: 9 pt text stays legible when a phone scales the figure to its screen

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


def thin(x: Array, y: Array, limit: int = MAX_POINTS) -> tuple[Array, Array]:
    """At most `limit` points that keep every bucket's lowest and highest; non-finite ones go."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= limit:
        return x, y
    kept: set[int] = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), (limit - 2) // 2):
        kept |= {int(bucket[np.argmin(y[bucket])]), int(bucket[np.argmax(y[bucket])])}
    order = np.array(sorted(kept))
    return x[order], y[order]


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


def step_figure(runs: Sequence[RunData], heights: tuple[float, ...]) -> tuple[Figure, list[Axes]]:
    """Axes one above the other over one step axis, with phases and resumes drawn in."""
    figure = Figure(figsize=(WIDTH, sum(heights)))
    grid = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    axes: list[Axes] = list(grid[:, 0])
    for one in axes:
        _shade_phases(one, runs[0], named=one is axes[0])
        for run, color in zip(runs, run_colors(runs), strict=True):
            for launch in run.launches[1:]:
                tint = color if len(runs) > 1 else MUTED
                one.axvline(launch["step"] + 0.5, color=tint, linewidth=0.8, linestyle=(0, (4, 3)))
    last = max(run.step[-1] for run in runs)
    axes[-1].set_xlim(min(run.step[0] for run in runs) - 1, last + max(1.0, 0.01 * last))
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    return figure, axes


def run_colors(runs: Sequence[RunData]) -> list[str]:
    """One line colour per run."""
    return [LINES[number % len(LINES)] for number in range(len(runs))]


def _shade_phases(axes: Axes, run: RunData, named: bool) -> None:
    """Every other phase shaded, its name above the frame, or its number where that is too wide."""
    total = run.step[-1] - run.phases[0].first_step
    for number, phase in enumerate(run.phases):
        first, last = phase.first_step + 0.5, phase.last_step + 0.5
        if number % 2 == 0:
            axes.axvspan(first, last, facecolor=BAND, edgecolor="none", zorder=0)
        if named:
            fits = (last - first) / total * 60 > len(phase.name)
            axes.annotate(
                phase.name if fits else str(number + 1),
                ((first + last) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=MUTED,
            )


def mark_checkpoints(axes: Axes, run: RunData, color: str) -> None:
    """Triangles on the step axis, at most about 100."""
    if not run.checkpoints:
        return  # an empty unclipped line has no extent and makes the layout collapse
    steps = np.array([row["step"] for row in run.checkpoints], dtype=np.float64)
    shown = steps if len(steps) <= 100 else steps[:: len(steps) // 50]
    axes.plot(
        shown,
        np.zeros_like(shown),
        "^",
        color=color,
        markersize=3.5,
        clip_on=False,
        transform=axes.get_xaxis_transform(),
    )


def log_axis(axes: Axes) -> None:
    """Log scale with plain numbers at 1, 2 and 5 times each power of ten."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def add_legend(axes: Axes) -> None:
    """A legend where there is anything to name."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, loc="best", ncols=2 if len(labels) > 4 else 1)
