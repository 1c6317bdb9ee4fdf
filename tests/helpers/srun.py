"""Stand-in for srun, run as a script: two tasks of these words, one to a node; it hands USR1 on to
every process of a task, as slurmd does, and returns the highest exit code."""

import os
import signal
import subprocess
import sys
from contextlib import suppress


def main(words: list[str]) -> int:
    """Run `--option... COMMAND...`; of the options it knows --output."""
    output = os.devnull
    while words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        output = value if name == "--output" else output
    tasks: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: object) -> None:
        for task in tasks:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(task.pid, number)

    signal.signal(signal.SIGUSR1, hand_on)
    for place in range(2):
        with open(output.replace("%N", f"n{place}"), "wb") as log:
            tasks.append(
                subprocess.Popen(
                    words,
                    env={**os.environ, "SLURM_PROCID": str(place), "SLURM_LOCALID": "0"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    codes = [task.wait() for task in tasks]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # not to die of it on the way out
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
