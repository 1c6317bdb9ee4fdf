"""Static cost of a hot loop by llvm-mca, where LLVM 22 is installed.

For comparing variants of one kernel and for noticing a slower one; not a measurement. llvm-mca
knows issue order and pipe occupancy; it assumes short LDS and memory latencies, no bank conflicts
and one wave. LLVM 19 crashes on these loops, older ones do not know gfx942.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

CLOCKS_PER_CYCLE = 4
"""One cycle of llvm-mca is the time of one wave-wide vector instruction."""
CLOCKS_PER_MATRIX = 16
"""Of a 16x16x16 (gfx942) or 16x16x32 (gfx950) bf16 product."""
_ITERATIONS = 10


@dataclass(frozen=True)
class Score:
    """One iteration of a hot loop, one wave."""

    clocks: int
    matrix_share: float
    """Part of the clocks in which the matrix pipe is busy."""


def find_mca() -> str | None:
    """llvm-mca of LLVM 22 or later: $LLVM_MCA, or `llvm-mca-22` on PATH; None without."""
    return os.environ.get("LLVM_MCA") or shutil.which("llvm-mca-22")


def score(loop: list[str], matrix: int, arch: str, tool: str) -> Score:
    """Cost of a loop's instructions; RuntimeError with llvm-mca's message where it fails."""
    straight = [line for line in loop if not re.match(r"\s+s_c?branch|\s+s_endpgm", line)]
    done = subprocess.run(
        [tool, "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={arch}", f"-iterations={_ITERATIONS}"],
        input="\n".join(straight) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"{tool}: {done.stderr.strip().splitlines()[:1]}")
    clocks = int(found.group(1)) * CLOCKS_PER_CYCLE // _ITERATIONS
    return Score(clocks, round(matrix * CLOCKS_PER_MATRIX / clocks, 3))
