"""How long a bad configuration takes to be told: every one a process of its own.

python -m tests.bench.bad_configurations
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

from tests.helpers.bad_configurations import BAD
from tests.integration.runs import ENVIRONMENT


def main() -> int:
    """Print the times; 1 if a message is not one line."""
    seconds, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for override, fragments in BAD:
            recipe = [] if override.startswith("recipe=") else ["recipe=smoke_cpu"]
            command = [sys.executable, "-m", "zaya_train", "train", *recipe, override]
            begin = time.perf_counter()
            done = subprocess.run(
                command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
            )
            seconds.append(time.perf_counter() - begin)
            lines = done.stderr.splitlines()
            told = len(lines) == 1 and all(fragment in lines[0] for fragment in fragments)
            if done.returncode != 2 or not told:
                wrong.append(override)
    print(
        f"{len(BAD)} bad configurations, {len(BAD) - len(wrong)} told in one clear line: "
        f"median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s"
    )
    for override in wrong:
        print(f"not one clear line: {override}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
