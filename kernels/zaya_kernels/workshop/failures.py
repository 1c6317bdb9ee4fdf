"""What back ends raise that cannot run somewhere."""

from __future__ import annotations


def failures() -> tuple[type[Exception], ...]:
    """torch's and ours (memory, compilation, shapes, types), and Triton's if it is installed."""
    known: tuple[type[Exception], ...] = (
        RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError,
    )  # fmt: skip
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)
