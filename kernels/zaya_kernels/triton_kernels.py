"""Which work a program of a Triton kernel does."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def on_chiplets(i, programs, XCDS: tl.constexpr):
    """Number of the work of program i of `programs`.

    The hardware deals programs out to the XCDS chiplets in turn, each with a cache of its own;
    so dealt, those of one chiplet get adjacent work.
    """
    if XCDS == 1:
        return i
    chiplet = i % XCDS
    return chiplet * (programs // XCDS) + tl.minimum(chiplet, programs % XCDS) + i // XCDS
