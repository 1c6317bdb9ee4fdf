"""What a logged step pays for its observations (train.observe): steps with and without alternate in
one process, so that a busy machine slows both alike.

    python -m tests.bench.observe [--steps 40] [--ranks 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

from rich.console import Console

from tests.dist.harness import Case, Setup
from tests.helpers.distributed import run_ranks
from zaya_train.train.observe import observations, watched

if TYPE_CHECKING:
    from typing import Any

SIZES: dict[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 128,
    "model.num_query_heads": 8,
    "model.head_dim": 16,
    "model.num_experts": 8,
    "model.expert_ffn_size": 128,
    "model.router_size": 32,
    "model.max_context_tokens": 1024,
}
"""The smoke model's order of size, so that its step is as short beside the observations."""


def timed(steps: int, ranks: int) -> list[tuple[float, float, float]]:
    """Per pair of steps: seconds without, with, and of the observations' own reduction."""
    setup = Setup.of(Case(shard=ranks, micro_rows=4 // ranks, row_tokens=512), **SIZES)
    found = []
    for number in range(steps + 3):
        times = []
        for wanted in (False, True):
            begin = time.perf_counter()
            with watched(setup.model, wanted) as watch:
                setup.step(number)
            middle = time.perf_counter()
            if watch:
                observations(watch, setup.optimizer, setup.reduction.replicas, 0)
            times += [time.perf_counter() - begin, time.perf_counter() - middle]
        found.append((times[0], times[2], times[3]))
    return found[3:]  # the first steps warm up


def main() -> None:
    """Print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    rows = run_ranks(timed, options.ranks, options.steps, options.ranks)[0]
    without, with_all, reduction = (statistics.median(column) for column in zip(*rows, strict=True))
    extra = statistics.median(row[1] - row[0] for row in rows)
    Console().print(
        f"{options.ranks} ranks: step {1e3 * without:.1f} ms, observed {1e3 * with_all:.1f} ms, "
        f"median difference {1e3 * extra:.2f} ms ({100 * extra / without:.2f} %), "
        f"of it gathering {1e3 * reduction:.2f} ms"
    )


if __name__ == "__main__":
    main()
