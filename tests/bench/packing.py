"""Packing speed, fullness and balance, beside TRL's `bfd` where TRL can be imported.

    python -m tests.bench.packing --rounds 5

Lengths are lognormal (mean 2,000, sigma 1), clipped to the row. Planners take turns within one run;
CPU seconds are medians. TRL is no dependency of this project: put a copy on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from zaya_train.data.order import balanced_row
from zaya_train.data.packing import PackedRows, pack_best_fit

if TYPE_CHECKING:
    from collections.abc import Callable

CAPACITIES = (4096, 4097, 32_768, 32_769, 131_072, 131_073)
RANKS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cap", type=int, nargs="+", default=[1 << 30, 2048, 1024, 256])
    options = parser.parse_args()
    console = Console(width=140)
    trl = _trl(console)
    table = Table(title=f"{options.count:,} documents", title_justify="left")
    for name in (
        "row tokens",
        "cap",
        "CPU s",
        "TRL CPU s",
        "ratio",
        "full %",
        "rows",
        "bound",
        "work shuffled",
        "work balanced",
    ):
        table.add_column(name, justify="right")
    rng = np.random.default_rng(0)
    raw = rng.lognormal(np.log(2000) - 0.5, 1.0, options.count).astype(np.int64)
    for row_tokens in CAPACITIES:
        lengths = raw.clip(1, row_tokens)
        for cap in options.cap:
            _measure(table, lengths, row_tokens, cap, options.rounds, trl)
    console.print(table)


def _trl(console: Console) -> Callable[[np.ndarray, int], float] | None:
    """CPU seconds of TRL's planning, or None where TRL is not there."""
    try:
        import pyarrow
        from pyarrow import compute
        from trl import data_utils
    except ImportError as error:
        console.print(f"TRL left out: {error}")
        return None

    def seconds(lengths: np.ndarray, row_tokens: int) -> float:
        # TRL plans and moves tokens in one call. Tokens are one byte here, and what moving them
        # takes is measured by itself and left out.
        offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]), pyarrow.int64())
        values = pyarrow.array(np.zeros(int(lengths.sum()), np.int8))
        column = pyarrow.LargeListArray.from_arrays(offsets, values)
        start = time.process_time()
        data_utils._pack_bfd(pyarrow.table({"input_ids": column}), row_tokens)
        middle = time.process_time()
        compute.take(column, np.argsort(-lengths))
        return (middle - start) - (time.process_time() - middle)

    return seconds


def _measure(
    table: Table,
    lengths: np.ndarray,
    row_tokens: int,
    cap: int,
    rounds: int,
    trl: Callable[[np.ndarray, int], float] | None,
) -> None:
    documents = np.arange(len(lengths))
    ours, theirs = [], []
    packed = pack_best_fit(documents, lengths, row_tokens, cap)
    for _ in range(rounds):
        start = time.process_time()
        packed = pack_best_fit(documents, lengths, row_tokens, cap)
        ours.append(time.process_time() - start)
        if trl is not None and cap > len(lengths):
            theirs.append(trl(lengths, row_tokens))
    seconds = statistics.median(ours)
    other = statistics.median(theirs) if theirs else None
    table.add_row(
        f"{row_tokens:,}",
        f"{cap:,}" if cap < 1 << 30 else "none",
        f"{seconds:.3f}",
        f"{other:.2f}" if other else "",
        f"{other / seconds:.0f}" if other else "",
        f"{100 * int(lengths.sum()) / (len(packed) * row_tokens):.4f}",
        f"{len(packed):,}",
        f"{-(-int(lengths.sum()) // row_tokens):,}",
        f"{_imbalance(packed, lengths, 1):.2f}",
        f"{_imbalance(packed, lengths, RANKS):.2f}",
    )


def _imbalance(packed: PackedRows, lengths: np.ndarray, group: int) -> float:
    """Slowest of RANKS over their mean attention work, mean over the steps of an epoch."""
    squares = np.add.reduceat(lengths[packed.documents] ** 2, packed.offsets[:-1])
    rising = np.sort(squares)
    count = len(rising) // RANKS * RANKS
    order = [balanced_row(i, len(rising), group, 0, "benchmark") for i in range(count)]
    steps = rising[order].reshape(-1, RANKS)
    return float((steps.max(axis=1) / steps.mean(axis=1)).mean())


if __name__ == "__main__":
    main()
