"""The planner's peak memory beside the recorded rehearsal's, every shipped recipe and phase.

python -m tests.bench.forecast
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tests.helpers import rehearsal_table
from tests.unit.test_forecast import GOLDEN, SHIPPED, peak_of
from zaya_train.planning.components import GB


def main() -> None:
    """Print the table."""
    table = Table("launch", "phase", "forecast GB", "rehearsed GB", "difference")
    for launch, phase in SHIPPED:
        overrides, ranks = rehearsal_table.LAUNCHES[launch]
        found = peak_of(overrides, ranks, phase)
        peak = max(GOLDEN[launch][phase]["peak_bytes"].values())
        sizes = (f"{found / GB:.3f}", f"{peak / GB:.3f}")
        table.add_row(launch, phase, *sizes, f"{found / peak - 1:+.3%}")
    Console().print(table)


if __name__ == "__main__":
    main()
