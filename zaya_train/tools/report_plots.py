"""The figures of a report, drawn with matplotlib's object interface (no global state)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from zaya_train.tools.report_data import Array, RunData
from zaya_train.tools.report_figure import (
    ALARM,
    INK,
    LINES,
    MUTED,
    STYLE,
    WIDTH,
    add_legend,
    log_axis,
    mark_checkpoints,
    run_colors,
    smooth,
    step_figure,
    thin,
)

MAX_COLUMNS = 240  # of the heat map


@dataclass(frozen=True)
class Plot:
    """One figure with its words."""

    name: str
    """File name without suffix; also the id in the page."""
    title: str
    caption: str
    figure: Figure


def draw_plots(runs: Sequence[RunData]) -> list[Plot]:
    """All figures for these runs; those without data are left out."""
    # A line of one point is invisible without a marker.
    marker = "." if all(len(run.steps) < 3 for run in runs) else "None"
    with matplotlib.rc_context({**STYLE, "lines.marker": marker}):
        plots = [
            Plot("loss", "Loss", _loss_caption(runs), _loss(runs)),
            *_exact_match(runs),
            Plot("learning_rate", "Learning rate", "Peak values times schedule.", _rates(runs)),
            Plot(
                "grad_norm",
                "Gradient norm",
                "Global norm before clipping. Red marks: steps skipped as non-finite.",
                _grad_norm(runs),
            ),
            Plot(
                "router",
                "Router balance",
                "Entropy of the load over ln E, mean over layers (1 is even); share of tokens "
                "that skip the experts; excess of the busiest class over its even share.",
                _router(runs),
            ),
            *(_load(run, several=len(runs) > 1) for run in runs if run.loads[0].size),
            Plot(
                "throughput",
                "Throughput",
                "Tokens per second over all ranks; time of a step and the part spent waiting "
                "for data.",
                _throughput(runs),
            ),
        ]
        if any(np.any(run.column("memory_bytes") > 0) for run in runs):
            caption = "Peak memory of the process or device that writes the metrics."
            plots.append(Plot("memory", "Memory", caption, _memory(runs)))
        return plots


def _loss(runs: Sequence[RunData]) -> Figure:
    figure, (axes,) = step_figure(runs, heights=(3.0,))
    lows: list[float] = []
    for run, color in zip(runs, run_colors(runs), strict=True):
        loss = run.column("loss")
        lows += [float(value) for value in loss[np.isfinite(loss)]]
        axes.plot(*thin(run.step, loss), color=color, alpha=0.3, linewidth=0.8)
        label = run.name if len(runs) > 1 else "training"
        axes.plot(*thin(run.step, _smooth_by_phase(run)), color=color, label=label)
        for number, (name, (steps, losses)) in enumerate(run.validation.items()):
            if len(runs) > 1:
                axes.plot(*thin(steps, losses), ":", color=color, linewidth=1.1)
                continue
            style: dict[str, Any] = {"color": LINES[1 + number % 7], "label": f"held out: {name}"}
            axes.plot(*thin(steps, losses), marker="o", markersize=2.5, linewidth=1.0, **style)
        mark_checkpoints(axes, run, color)
    if lows and min(lows) > 0 and max(lows) / min(lows) > 20:
        log_axis(axes)
    axes.set_ylabel("loss per supervised token")
    add_legend(axes)
    return figure


def _loss_caption(runs: Sequence[RunData]) -> str:
    phases = ", ".join(f"{number} {span.name}" for number, span in enumerate(runs[0].phases, 1))
    whose = f"Phases of {runs[0].name}" if len(runs) > 1 else "Phases"
    held_out = " Dotted: held-out losses." if len(runs) > 1 else ""
    return (
        f"{whose}: {phases}. Thin: every logged step; thick: running mean within the phase."
        f"{held_out} Triangles on the axis are checkpoints, dashed lines resumes."
    )


def _smooth_by_phase(run: RunData) -> Array:
    loss = run.column("loss")
    parts = []
    for phase in run.phases:
        part = loss[(run.step > phase.first_step) & (run.step <= phase.last_step)]
        parts.append(smooth(part, span=max(5, len(part) // 20)))
    return np.concatenate(parts)


def _rates(runs: Sequence[RunData]) -> Figure:
    figure, (axes,) = step_figure(runs, heights=(2.2,))
    for run, color in zip(runs, run_colors(runs), strict=True):
        several = len(runs) > 1
        axes.plot(
            *thin(run.step, run.column("muon_lr")),
            color=color,
            label=run.name if several else "Muon (matrices)",
        )
        axes.plot(
            *thin(run.step, run.column("adamw_lr")),
            linestyle="--",
            color=color if several else LINES[1],
            label=None if several else "AdamW (embedding, norms, scales)",
        )
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)
    axes.set_ylabel("learning rate")
    add_legend(axes)
    return figure


def _grad_norm(runs: Sequence[RunData]) -> Figure:
    figure, (axes,) = step_figure(runs, heights=(2.4,))
    for run, color in zip(runs, run_colors(runs), strict=True):
        norm = run.column("grad_norm")
        axes.plot(*thin(run.step, norm), color=color, linewidth=0.9, label=run.name)
        skipped = run.step[run.column("applied") == 0]
        axes.plot(
            skipped,
            np.full_like(skipped, 0.97),
            "v",
            color=ALARM,
            markersize=4,
            transform=axes.get_xaxis_transform(),
        )
    if any(np.any(run.column("grad_norm") > 0) for run in runs):
        log_axis(axes)
    axes.set_ylabel("gradient norm")
    if len(runs) > 1:
        add_legend(axes)
    return figure


def _router(runs: Sequence[RunData]) -> Figure:
    figure, (shares, violation) = step_figure(runs, heights=(1.9, 1.4))
    for run, color in zip(runs, run_colors(runs), strict=True):
        several = len(runs) > 1
        second = color if several else LINES[1]
        entropy_label = run.name if several else "load entropy"
        shares.plot(*thin(run.step, run.column("load_entropy")), color=color, label=entropy_label)
        shares.plot(
            *thin(run.step, run.column("skip_rate")),
            linestyle="--",
            color=second,
            label=None if several else "skip rate",
        )
        violation.plot(*thin(run.step, run.column("max_violation")), color=color, linewidth=1.0)
    shares.set_ylim(-0.02, 1.06)
    violation.set_ylim(bottom=0)
    shares.set_ylabel("share")
    violation.set_ylabel("max violation")
    add_legend(shares)
    return figure


def _load(run: RunData, several: bool) -> Plot:
    """Heat map [layers x (classes + 1), time]; the extra row per layer is the gap."""
    steps, loads = run.loads
    columns = _average_over_time(steps, loads)
    count, layers, classes = columns.shape
    even = np.clip(np.log2(np.maximum(columns * classes, 1e-9)), -2, 2)
    gaps = np.full((count, layers, 1), np.nan)
    # The gap must be thinner than the classes are tall: one row of ten per class.
    tall = np.repeat(even, 10, axis=2)
    image = np.concatenate([tall, np.repeat(gaps, 6, axis=2)], axis=2).reshape(count, -1).T
    height = min(8.0, max(3.2, 1.0 + 0.045 * layers * classes))
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots()
    extent = (steps[0] - 0.5, steps[-1] + 0.5, layers - 0.5, -0.5)
    shown = axes.imshow(
        image, aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2, extent=extent, interpolation="nearest"
    )
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=14, integer=True, min_n_ticks=1))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    _separate_phases(axes, run)
    bar = figure.colorbar(shown, ax=axes, ticks=[-2, -1, 0, 1, 2], pad=0.02, aspect=30)
    bar.ax.set_yticklabels(["1/4", "1/2", "even", "2x", "4x"])
    bar.outline.set_visible(False)
    caption = (
        f"Share of tokens each of the {classes} classes got, against an even split. A block is a "
        "layer; within it the experts run from top to bottom, the skip class, where there is one, "
        "last. Dark blue is a starving expert, dark red a crowded one."
    )
    name = f"load_{run.name}" if several else "load"
    return Plot(name, f"Expert load{f', {run.name}' if several else ''}", caption, figure)


def _average_over_time(steps: Array, loads: Array) -> Array:
    """[N, L, C] -> [at most MAX_COLUMNS, L, C], equal stretches of steps averaged."""
    count = min(len(steps), MAX_COLUMNS)
    edges = np.linspace(steps[0], steps[-1] + 1, count + 1)
    column = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, count - 1)
    out = np.empty((count, *loads.shape[1:]))
    for index in range(count):
        rows = loads[column == index]
        out[index] = rows.mean(axis=0) if len(rows) else out[max(index - 1, 0)]
    return out


def _throughput(runs: Sequence[RunData]) -> Figure:
    figure, (rate, seconds) = step_figure(runs, heights=(1.7, 1.7))
    for run, color in zip(runs, run_colors(runs), strict=True):
        several = len(runs) > 1
        rate.plot(
            *thin(run.step, run.column("tokens_per_second")),
            color=color,
            linewidth=0.9,
            label=run.name,
        )
        step_label = None if several else "step"
        seconds.plot(
            *thin(run.step, run.column("step_seconds")),
            color=color,
            linewidth=0.9,
            label=step_label,
        )
        seconds.plot(
            *thin(run.step, run.column("data_seconds")),
            linestyle="--",
            color=color if several else LINES[1],
            linewidth=0.9,
            label=None if several else "waiting for data",
        )
        mark_checkpoints(rate, run, color)
    rate.set_ylim(0, 1.1 * rate.get_ylim()[1])
    rate.yaxis.set_major_formatter(EngFormatter(sep=""))
    rate.set_ylabel("tokens / s")
    if any(np.any(run.column("data_seconds") > 0) for run in runs):
        log_axis(seconds)
    seconds.set_ylabel("seconds")
    add_legend(rate if len(runs) > 1 else seconds)
    return figure


def _memory(runs: Sequence[RunData]) -> Figure:
    figure, (axes,) = step_figure(runs, heights=(1.8,))
    for run, color in zip(runs, run_colors(runs), strict=True):
        gibibytes = run.column("memory_bytes") / 2**30
        axes.plot(*thin(run.step, gibibytes), color=color, label=run.name)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_ylabel("GiB")
    if len(runs) > 1:
        add_legend(axes)
    return figure


def _exact_match(runs: Sequence[RunData]) -> list[Plot]:
    """Bars by problem family, one colour per evaluation; nothing where no run was evaluated."""
    several = len(runs) > 1
    found = [
        (f"{run.name}: {evaluation.name}" if several else evaluation.name, evaluation)
        for run in runs
        for evaluation in run.evaluations
    ]
    families = sorted({name for _, evaluation in found for name in evaluation.by_family})
    if not families:
        return []
    rows = ["all families", *families]
    thickness = 0.8 / len(found)
    figure = Figure(figsize=(WIDTH, 0.9 + len(rows) * max(0.24, 0.13 * len(found))))
    axes = figure.subplots()
    for number, (label, evaluation) in enumerate(found):
        scores = [evaluation.overall, *(evaluation.by_family.get(name) for name in families)]
        places = np.arange(len(rows)) + (number - (len(found) - 1) / 2) * thickness
        shares = [100 * score.share if score else 0.0 for score in scores]
        color = LINES[0] if number == len(found) - 1 else LINES[1 + number % 7]
        bars = axes.barh(places, shares, height=thickness * 0.9, color=color, label=label)
        texts = [f"{share:.0f}" for share in shares]
        axes.bar_label(bars, labels=texts, padding=2, fontsize=7, color=MUTED)
    axes.set_yticks(np.arange(len(rows)), rows)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("exact match, %")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper right", ncols=min(len(found), 3))
    caption = "Answers to held-out problems that match exactly, by problem family."
    return [Plot("exact_match", "Exact match", caption, figure)]


def _separate_phases(axes: Axes, run: RunData) -> None:
    for phase in run.phases[:-1]:
        # Not INK: the image keeps its light colours on a dark page.
        axes.axvline(phase.last_step + 0.5, color="#222222", linewidth=0.8)
