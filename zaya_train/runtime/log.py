"""Logging of one rank: a plain file for every rank, the console for rank 0 only."""

from __future__ import annotations

import logging
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler

from zaya_train.config.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = "zaya_train"
FILE_ONLY = {"file_only": True}
"""`extra=` of a record that the console shall not repeat."""
FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_path(run_dir: Path, rank: int) -> Path:
    """The log file of `rank` below the run directory."""
    return run_dir / "logs" / f"rank-{rank}.log"


@contextmanager
def logging_to(run_dir: Path, rank: int, console: Console | None = None) -> Iterator[None]:
    """Route this package's INFO and everyone's WARNING to the rank's file while the context lasts.

    Rank 0 also writes to `console` (standard error if None); hand over the console of the progress
    bar, so that lines and bar do not overwrite each other. Files are appended to: a resumed run
    continues its log. Python warnings become log lines.

    Raises:
        StorageError: the log file cannot be opened.
    """
    handlers: list[logging.Handler] = [_file_handler(log_path(run_dir, rank))]
    if rank == 0:
        handlers.append(console_handler(console or Console(stderr=True)))
    root, package = logging.getLogger(), logging.getLogger(PACKAGE)
    level = package.level
    package.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        package.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            # A full disk refuses what logging still holds: that must not end this rank alone.
            with suppress(OSError):
                handler.close()


def console_handler(console: Console) -> logging.Handler:
    """For a terminal; where `console` is none, a line per record as in the ranks' files: a job's
    log would else be broken at 80 columns."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False)
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter(FILE_FORMAT))
    handler.addFilter(lambda record: not getattr(record, "file_only", False))
    return handler


def _file_handler(path: Path) -> logging.FileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot write the log: {error.strerror}") from error
    handler.setFormatter(logging.Formatter(FILE_FORMAT))
    return handler
