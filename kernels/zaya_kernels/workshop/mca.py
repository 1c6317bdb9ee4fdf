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


def score(loop: list[str], arch: str, tool: str) -> Score:
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
    return Score(clocks, round(_matrix_cycles(done.stdout) * CLOCKS_PER_CYCLE / clocks, 3))


def _matrix_cycles(report: str) -> float:
    """Cycles of an iteration in which the matrix pipe is busy: 4 for each 16x16x16 bf16 product
    (16x16x32 on gfx950), 8 for a 16x16x4 one of fp32 numbers."""
    pipe = re.search(r"^\[(\d+)\]\s+- HWXDL$", report, re.MULTILINE)
    busy = re.search(r"^Resource pressure per iteration:\n.*\n(.*)$", report, re.MULTILINE)
    if pipe is None or busy is None:
        raise RuntimeError("llvm-mca reports no pressure on the matrix pipe (HWXDL)")
    cycles = busy.group(1).split()[int(pipe.group(1))]
    return 0.0 if cycles == "-" else float(cycles)
