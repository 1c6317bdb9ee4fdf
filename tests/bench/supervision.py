"""How soon a stopped rank is named and the run is under way again, on real runs of two ranks.

python -m tests.bench.supervision --trials 5
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.supervised import CHANGES, Supervised
from tests.integration.runs import make_corpora, overrides_for, values_for

HANG_SECONDS = 6.0


def main() -> int:
    """Print what every trial took; 1 if another rank was named or it took too long."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=5)
    trials = parser.parse_args().trials
    named, again, wrong = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        corpora = make_corpora(Path(folder))
        for trial in range(trials):
            run_dir, victim = Path(folder) / f"run-{trial}", random.randrange(2)
            changes = {**CHANGES, "supervisor.hang_seconds": HANG_SECONDS}
            words = overrides_for(values_for(run_dir, corpora, changes))
            with Supervised(words, run_dir, run_dir.with_suffix(".log"), "--ranks", "2") as run:
                os.kill(run.pid_of(victim, 1), signal.SIGSTOP)
                begin = time.perf_counter()
                run.until((run_dir / "incidents.jsonl").exists)
                named.append(time.perf_counter() - begin)
                run.pid_of(victim, 2)
                again.append(time.perf_counter() - begin)
                wrong += run.incidents()[0]["named"] != [victim]
                run.process.send_signal(signal.SIGTERM)
                run.wait()
    late = [seconds for seconds in named if seconds > HANG_SECONDS + 5]
    print(
        f"{trials} stopped ranks, limit {HANG_SECONDS:g} s: {trials - wrong} named rightly, after "
        f"median {statistics.median(named):.2f} s, longest {max(named):.2f} s; second step of the "
        f"next attempt after median {statistics.median(again):.1f} s, longest {max(again):.1f} s"
    )
    return bool(wrong or late)


if __name__ == "__main__":
    sys.exit(main())
