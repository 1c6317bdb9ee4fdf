"""Stopping on request: a signal to any rank stops all ranks at the same step.

Schedulers warn before they kill (SIGTERM on preemption, SIGUSR1 ahead of a time limit, SIGINT from
a keyboard), and not all ranks hear it at the same step. The handler only records the signal; every
step carries what its rank has heard to all of them (`train.step`), and the loop saves and exits
with the requeue code.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import EXIT_REQUEUE

if TYPE_CHECKING:
    from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Records the first stop signal between `install` and `uninstall`; also a context manager.

    Until `arm` is called there is nothing to save, and a signal ends the process at once with the
    requeue code: a rank that waits for its peers to appear would not look at a record.

    Later signals change nothing, so a second SIGTERM during the final save does not break it. Only
    a second SIGINT raises KeyboardInterrupt: a person at the keyboard wants out now.
    """

    def __init__(self) -> None:
        self._received = 0
        self._armed = False
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over the stop signals. Main thread only (Python's rule)."""
        if self._previous:
            raise RuntimeError("StopFlag is already installed")
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._record)

    def arm(self) -> None:
        """From now on signals are recorded, and somebody looks at `received` at every step."""
        self._armed = True

    def uninstall(self) -> None:
        """Give the signals back to the handlers found by `install`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __enter__(self) -> StopFlag:
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.uninstall()

    @property
    def received(self) -> signal.Signals | None:
        """The first signal this rank heard."""
        return signal.Signals(self._received) if self._received else None

    def _record(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            sys.stderr.write(f"{signal.Signals(number).name} before the first step\n")
            sys.stderr.flush()
            # Rendezvous and imports are C code that no exception leaves in time.
            os._exit(EXIT_REQUEUE)
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or number
