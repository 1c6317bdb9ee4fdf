"""Newton-Schulz on a CPU: ours per matrix against torch.optim.Muon's, timed alternately.

Both in bf16 (torch.optim.Muon has no other) and five steps; CPU seconds, which other processes
disturb less than wall time. The figure to read is the median of the pairwise ratios.

    python kernels/bench/newton_schulz.py [--rounds 5] [--matrices 16] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch.optim._muon import _zeropower_via_newtonschulz
from zaya_kernels.newton_schulz.gram import operations
from zaya_kernels.newton_schulz.op import FIVE_QUINTICS, QUINTIC, newton_schulz

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = len(FIVE_QUINTICS)


def cpu_seconds(run: Callable[[], object]) -> float:
    """Of one call, over all threads."""
    started = time.process_time()
    run()
    return time.process_time() - started


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed pairs")
    parser.add_argument("--matrices", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    matrices = torch.randn(arguments.matrices, arguments.rows, arguments.columns)

    def ours() -> object:
        return newton_schulz(matrices, FIVE_QUINTICS, torch.bfloat16, "gram")

    def theirs() -> object:
        return [_zeropower_via_newtonschulz(x, QUINTIC, STEPS, 1e-7) for x in matrices]

    pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(arguments.rounds)]
    ratios = [b / a for a, b in pairs]
    seconds = [statistics.median(column) / len(matrices) for column in zip(*pairs, strict=True)]
    console = Console()
    console.print(f"torch {torch.__version__}, {tuple(matrices.shape)}, {STEPS} steps, bf16")
    console.print(f"CPU s per matrix: ours {seconds[0]:.3f}, torch.optim.Muon {seconds[1]:.3f}")
    console.print(
        f"torch.optim.Muon / ours: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to "
        f"{max(ratios):.2f} over {len(ratios)} pairs"
    )
    small, large = sorted(matrices.shape[1:])
    mine, plain = operations(small, large, FIVE_QUINTICS)
    console.print(f"multiply-adds: {mine / plain:.2f} of the plain form")


if __name__ == "__main__":
    main()
