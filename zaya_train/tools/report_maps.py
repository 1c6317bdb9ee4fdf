"""Heat maps of a report: layers and classes over time, as grey PNG files that the page colours.

Legend: N rows of the metrics, L layers, C classes.
"""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from zaya_train.tools.report_data import MANY

if TYPE_CHECKING:
    from zaya_train.tools.report_data import Array, RunData

MAX_COLUMNS = 300
MAX_COLUMNS_OF_MANY = 120  # with more than MANY runs on the page
LEVELS = 254  # greys 1 to 255; grey 0 stands for no value


@dataclass(frozen=True)
class Map:
    """One kind of heat map."""

    id: str
    title: str
    caption: str
    key: str
    """The field of the step rows."""
    unit: str
    diverging: bool = True
    """Zero is the middle of the colours."""
    first_row: int = 0
    """Number of the layer on top."""


MAPS = (
    Map(
        "load_map",
        "Expert load",
        "Share of tokens each class got, as a power of two over its even share; means over equal "
        "stretches of steps (single steps show in the largest violation). A block is a layer, "
        "experts from top to bottom, the skip class, where there is one, last. Blue is a starving "
        "expert, red a crowded one; colours end at a quarter and at four times.",
        "load",
        "log2 of load over even",
    ),
    Map(
        "bias_map",
        "Balancing biases",
        "What the controller adds to each class's probability before the choice; laid out as the "
        "load. Colours and lines end at the experts' largest, which the skip class passes.",
        "balancing_bias",
        "bias",
    ),
    Map(
        "stream_map",
        "Residual stream",
        "Root mean square before the first layer (top) and behind each.",
        "stream_rms",
        "log2 of RMS",
        diverging=False,
    ),
    Map(
        "eda_map",
        "EDA gains",
        "Mean learned weight of the router state before; layer 0 has none.",
        "eda_gain",
        "gain",
        diverging=False,
        first_row=1,
    ),
)


def maps() -> list[dict[str, Any]]:
    """What the page is told about its heat maps."""
    return [asdict(each) for each in MAPS]


def run_maps(run: RunData, several: int) -> dict[str, dict[str, Any]]:
    """Map -> {png, first, last, low, high, layers, classes} of one run."""
    limit = MAX_COLUMNS if several <= MANY else MAX_COLUMNS_OF_MANY
    found = {}
    for each in MAPS:
        steps, values = run.matrix(each.key)
        if not values.size:
            continue
        values = values.reshape(len(steps), values.shape[1], -1)
        columns = average_over_time(steps, values, limit)
        low_high = None
        if each.key == "load":
            columns = np.log2(np.maximum(columns * columns.shape[2], 1e-9))
            low_high = (-2.0, 2.0)
        if each.key == "stream_rms":
            columns = np.log2(np.maximum(columns, 1e-9))
        # The skip class's bias starts at -1, which would leave no colour for the experts'.
        told = columns[..., : _experts(run)] if each.key == "balancing_bias" else columns
        low, high = low_high or _range(told, each.diverging)
        found[each.id] = {
            "png": base64.b64encode(_png(columns, low, high)).decode("ascii"),
            "first": float(steps[0] - 0.5),
            "last": float(steps[-1] + 0.5),
            "low": low,
            "high": high,
            "layers": columns.shape[1],
            "classes": columns.shape[2],
        }
    return found


def average_over_time(steps: Array, values: Array, limit: int) -> Array:
    """[N, L, C] -> [at most limit, L, C], equal stretches of steps averaged."""
    count = min(len(steps), limit)
    edges = np.linspace(steps[0], steps[-1] + 1, count + 1)
    column = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, count - 1)
    out = np.empty((count, *values.shape[1:]))
    for index in range(count):
        rows = values[column == index]
        out[index] = _mean(rows) if len(rows) else out[max(index - 1, 0)]
    return out


def _mean(rows: Array) -> Array:
    """[N, L, C] -> [L, C] of the finite values; NaN where none is."""
    known = np.isfinite(rows)
    total = np.where(known, rows, 0.0).sum(axis=0)
    mean: Array = np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)
    return mean


def _experts(run: RunData) -> int | None:
    """Classes that are experts; None, which slices to all, where the configuration is unknown."""
    number = run.config.get("model", {}).get("num_experts")
    return int(number) if number else None


def _range(columns: Array, diverging: bool) -> tuple[float, float]:
    finite = columns[np.isfinite(columns)]
    if not finite.size:
        return -1.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if diverging:
        high = max(abs(low), abs(high), 1e-9)
        low = -high
    return low, high if high > low else low + 1.0


def _png(columns: Array, low: float, high: float) -> bytes:
    """[N, L, C] -> a grey picture of L x C rows and N columns."""
    level = np.clip((columns - low) / (high - low), 0, 1) * LEVELS + 1
    grey = np.where(np.isfinite(columns), np.nan_to_num(level).round(), 0).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey.reshape(len(grey), -1).T).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
