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
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import EXIT_REQUEUE

if TYPE_CHECKING:
    from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Records the first stop signal between `install` and `uninstall`; also a context manager.

    Until `arm` is called there is nothing to save, and a signal ends the process at once with the
    requeue code: a rank that waits for its peers to appear would not look at a record. Nor would
    its handler run: it is Python, the wait is C in the main thread, for minutes. So a thread hears
    of signals from where the C handler writes them (signal.set_wakeup_fd).

    Later signals change nothing, so a second SIGTERM during the final save does not break it. Only
    a second SIGINT raises KeyboardInterrupt: a person at the keyboard wants out now.
    """

    def __init__(self) -> None:
        self._received = 0
        self._armed = False
        self._written: int | None = None
        self._leaving = Lock()
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over the stop signals. Main thread only (Python's rule)."""
        if self._previous:
            raise RuntimeError("StopFlag is already installed")
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._record)
        read, self._written = os.pipe()
        os.set_blocking(self._written, False)
        signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        Thread(target=self._listen, args=(read,), name="stop-signals", daemon=True).start()

    def arm(self) -> None:
        """From now on signals are recorded, and somebody looks at `received` at every step."""
        self._armed = True
        self._end_listening()

    def uninstall(self) -> None:
        """Give the signals back to the handlers found by `install`."""
        self._end_listening()
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

    def _listen(self, read: int) -> None:
        """Until `arm` or `uninstall`; of other signals nothing is to be done."""
        with open(read, "rb", buffering=0) as numbers:
            while heard := numbers.read(1):
                if heard[0] in STOP_SIGNALS and not self._armed:
                    self._leave(heard[0])

    def _end_listening(self) -> None:
        if self._written is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._written)
            self._written = None

    def _record(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            self._leave(number)
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or number

    def _leave(self, number: int) -> None:
        # Thread and handler may both come here: the other one's exit is a moment away.
        if self._leaving.acquire(blocking=False):
            sys.stderr.write(f"{signal.Signals(number).name} before the first step\n")
            sys.stderr.flush()
            # Rendezvous and imports are C code that no exception leaves in time.
            os._exit(EXIT_REQUEUE)
