"""Rooflines: what back ends reach of what the device's memory and matrix products allow."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from zaya_train.runtime.files import write_text
from zaya_train.tools.kernel_results import slug

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

_MARKERS = {"forward": "o", "backward": "s", "both": "^"}


def plot_path(folder: Path, device: str, op: str) -> Path:
    """Where the roofline of an operation on a device is."""
    return folder / f"roofline-{slug(device)}-{slug(op)}.svg"


def draw_roofline(rows: Iterable[Mapping[str, str]], path: Path) -> None:
    """One operation on one device: the newest row of every back end, shape, type and pass.

    `rows` are of kernel_results.read, oldest first; at least one.
    """
    newest = {tuple(row[key] for key in ("backend", "shape", "dtype", "pass")): row for row in rows}
    last = list(newest.values())[-1]
    # Text as text: smaller, and the same bytes wherever it is drawn.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        spread = _points(axes, newest.values())
        for dtype in dict.fromkeys(row["dtype"] for row in newest.values()):
            _roof(axes, dtype, [r for r in newest.values() if r["dtype"] == dtype][-1], spread)
        axes.set(xscale="log", yscale="log")
        axes.set(xlabel="operations per byte, at least", ylabel="TFLOP/s")
        axes.set_title(f"{last['op']}, {last['device']}, {last['date']}", loc="left")
        axes.legend(fontsize="small")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    write_text(path, text.getvalue())


def _points(axes: Axes, rows: Iterable[Mapping[str, str]]) -> tuple[float, float]:
    """One colour per back end, one marker per pass; the least and largest intensity."""
    places: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        speed = float(row["tflops"])
        place = (1e3 * speed / float(row["gb_per_second"]), speed)
        places.setdefault((row["backend"], row["pass"]), []).append(place)
    names = list(dict.fromkeys(backend for backend, _ in places))
    for (backend, direction), points in places.items():
        axes.plot(
            *zip(*points, strict=True),
            linestyle="none",
            marker=_MARKERS[direction],
            color=f"C{names.index(backend) % 10}",
            label=f"{backend}, {direction}",
        )
    found = [x for points in places.values() for x, _ in points]
    return min(found), max(found)


def _roof(axes: Axes, dtype: str, row: Mapping[str, str], spread: tuple[float, float]) -> None:
    copy, product = float(row["copy_gb_per_second"]) / 1e3, float(row["gemm_tflops"])
    knee = product / copy
    ends = [min(spread[0], knee) / 4, knee, max(spread[1], knee) * 4]
    label = f"roof, {dtype}: {1e3 * copy:,.0f} GB/s, {product:,.2f} TFLOP/s"
    axes.plot(ends, [ends[0] * copy, product, product], color="black", linewidth=1, label=label)
