"""What a run consumes against what the loader gives, and how long its steps waited for data.

    python -m tests.bench.consumption --run runs/smoke/run

Says tokens a second of the run's steps (median), tokens a CPU second of the loader on the run's
first source in rows of 4,096, and the share of step time that the steps waited for batches. The
exit code is 1 below 20 times the consumption or above 1 % of waiting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tests.bench.streams import stream_of
from zaya_train.train.metrics import METRICS_FILE, iter_rows

ROW_TOKENS, ROWS = 4096, 2000
LEAST_RATIO, MOST_WAIT = 20, 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished run")
    parser.add_argument("--root", type=Path, default=Path(), help="what its paths are relative to")
    options = parser.parse_args()
    steps = [row for row in iter_rows(options.run / METRICS_FILE) if row["kind"] == "step"]
    consumed = statistics.median(row["tokens_per_second"] for row in steps)
    waited = sum(row["data_seconds"] for row in steps) / sum(row["step_seconds"] for row in steps)
    config = json.loads((options.run / "config.json").read_text(encoding="utf-8"))
    source = next(iter(config["data"]["sources"].values()))
    given = _given(options.root / source["path"])
    Console(width=160, highlight=False).print(
        f"{len(steps)} steps; consumed {consumed:,.0f} tokens a second, waited for data "
        f"{100 * waited:.3f} % of step time; loader {given:,.0f} tokens a CPU second in rows of "
        f"{ROW_TOKENS:,}, {given / consumed:,.0f} times as much"
    )
    return int(given < LEAST_RATIO * consumed or waited > MOST_WAIT)


def _given(corpus: Path) -> float:
    """Tokens of rows a CPU second, from a plan made before."""
    with tempfile.TemporaryDirectory() as plans:
        stream = stream_of(corpus, ROW_TOKENS, plans)
        start = time.process_time()
        for index in range(ROWS):
            stream.row(index)
        return ROWS * ROW_TOKENS / (time.process_time() - start)


if __name__ == "__main__":
    sys.exit(main())
