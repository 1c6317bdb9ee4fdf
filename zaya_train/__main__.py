"""`python -m zaya_train` is the `zaya` command."""

import signal
import sys

from zaya_train.config.errors import EXIT_REQUEUE
from zaya_train.main import main


def command() -> int:
    """The process's exit code. A rank that was told to stop is often told again (by the scheduler,
    by its launcher); on its way out that would take the exit code with it."""
    code = main()
    if code == EXIT_REQUEUE:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(command())
