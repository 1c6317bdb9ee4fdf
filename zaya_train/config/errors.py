"""Errors a user can act on, each tied to one of the run's exit codes (design: exit codes)."""

from __future__ import annotations

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_NO_CHECKPOINT = 3
EXIT_STORAGE = 4
EXIT_NUMERICS = 5
EXIT_CRASH_LOOP = 6
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


class ZayaError(Exception):
    """A failure with a one-line explanation; `main` prints it and exits with `exit_code`."""

    exit_code = 1


class ConfigError(ZayaError):
    """A key, a value or a combination that cannot run; raised before anything is allocated."""

    exit_code = EXIT_CONFIG


class DataError(ZayaError):
    """Input data that breaks a rule; names file, line and rule."""

    exit_code = EXIT_CONFIG


class CheckpointError(ZayaError):
    """No checkpoint that can be used: none verifies, or it belongs to another model."""

    exit_code = EXIT_NO_CHECKPOINT


class StorageError(ZayaError):
    """The file system refused: full disk, I/O error, missing permission."""

    exit_code = EXIT_STORAGE


class LostRankError(ZayaError):
    """A rank died or hangs while others wait for it in a collective."""


class NumericsError(ZayaError):
    """Non-finite values, or replicas that differ: training must not continue through them."""

    exit_code = EXIT_NUMERICS


def first_line(error: BaseException, most_characters: int = 200) -> str:
    """A library's error in one line of a message of ours: its first line, or the name of its kind
    where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most_characters]
