"""Progress bar of one phase."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console


class PhaseProgress:
    """Bar over a phase's tokens with the current loss; silent without a terminal.

    Args:
        console: where to draw, None for no bar (ranks other than 0, or logging.progress off).
        name: the phase.
        total_tokens: tokens of the whole phase.
    """

    def __init__(self, console: Console | None, name: str, total_tokens: int) -> None:
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total_tokens, loss=float("nan"))

    def __enter__(self) -> PhaseProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, tokens: int, loss: float) -> None:
        """`tokens` consumed in this phase so far."""
        if self._bar:
            self._bar.update(self._task, completed=tokens, loss=loss)
