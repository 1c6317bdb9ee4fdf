"""How long runs' reports take to open in headless Chromium, at a desk's and a phone's width.

python -m tests.bench.report REPORT.html [--times 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from tests.helpers.browser import DESK, PHONE, browser, open_report


def main() -> None:
    """Print bytes, milliseconds from navigation to the last chart, and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    console = Console()
    console.print(f"{arguments.report}: {arguments.report.stat().st_size:,} bytes")
    for name, size in (("desk", DESK), ("phone", PHONE)):
        with browser(size) as page:
            told = [open_report(page, arguments.report) for _ in range(arguments.times)]
        taken = ", ".join(f"{one['milliseconds']:.0f}" for one in told)
        wrong = sum(len(one["errors"]) + len(one["console"]) for one in told)
        console.print(f"{name}: {taken} ms, {len(told[0]['charts'])} charts, {wrong} errors")


if __name__ == "__main__":
    main()
