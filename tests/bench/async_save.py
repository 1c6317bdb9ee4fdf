"""How long a save holds training up: waited for, and written in the background.

Both kinds alternate in one run over the same state and the same work between saves, so that a busy
machine slows both alike. Two figures: the time inside the call (`blocked`), and how much longer
the work between two saves takes than without any save (`cost`), for the writing thread takes
processor time from training where training computes on the processor.

    python -m tests.bench.async_save [--megabytes 500] [--ranks 2] [--rounds 6] [--work-seconds 4]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.faults.states import make_mesh, record
from tests.helpers.distributed import run_ranks
from zaya_train.train.checkpoint import CheckpointStore

MATRICES, VECTORS, BUFFERS = 60, 250, 30
"""Tensors of the state: about as many as the smoke model's with its optimizer."""
COLUMNS = 1024
KINDS = ("none", "waited", "background")


@dataclass(frozen=True)
class Timing:
    """One stretch of work that began with a save, seconds."""

    kind: str
    blocked: float
    """Inside the call that saves."""
    total: float
    """The call, the work, and what was still to be waited for at its end."""


def state_of(megabytes: int) -> dict[str, Tensor]:
    """Sharded matrices and vectors and plain buffers of this many bytes over all ranks."""
    mesh, placements = make_mesh(), [Replicate(), Shard(0)]
    rows = megabytes * 1_000_000 // 4 // COLUMNS // MATRICES
    state: dict[str, Tensor] = {
        f"model.{i:03d}.weight": distribute_tensor(torch.randn(rows, COLUMNS), mesh, placements)
        for i in range(MATRICES)
    }
    for i in range(VECTORS):
        state[f"model.{i:03d}.norm"] = distribute_tensor(torch.randn(64), mesh, placements)
    return state | {f"model.{i:03d}.bias": torch.zeros(16) for i in range(BUFFERS)}


def work(state: dict[str, Tensor], products: int) -> None:
    """Products with a reduction after every tenth, as a step has."""
    a = torch.ones(384, 384)
    for number in range(products):
        a = torch.mm(a, a).clamp_(-1, 1)
        if number % 10 == 0:
            dist.all_reduce(a)


def calibrated(state: dict[str, Tensor], seconds: float) -> int:
    """Products that take about `seconds` on this machine; the same number on every rank."""
    begin = time.perf_counter()
    work(state, 200)
    share = torch.tensor([seconds / (time.perf_counter() - begin)])
    dist.broadcast(share, 0)
    return int(200 * share.item())


def measure(root: Path, megabytes: int, rounds: int, seconds: float) -> list[Timing]:
    """On every rank; the first round of each kind warms up and is left out."""
    state = state_of(megabytes)
    store = CheckpointStore(root, keep_last=2)
    store.reserve(state)
    products = calibrated(state, seconds)
    timings, step = [], 0
    for number in range(rounds + 1):
        for kind in KINDS:
            step += 1
            dist.barrier()
            begin = time.perf_counter()
            if kind == "waited":
                store.save(state, record(step))
            elif kind == "background":
                store.start(state, record(step))
            blocked = time.perf_counter() - begin
            work(state, products)
            if store.under_way:
                store.finish()
            dist.barrier()
            if number:
                timings.append(Timing(kind, blocked, time.perf_counter() - begin))
    store.close()
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--work-seconds", type=float, default=4.0)
    parser.add_argument("--directory", help="where to write; default: the temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        ranks = run_ranks(
            measure,
            options.ranks,
            Path(folder),
            options.megabytes,
            options.rounds,
            options.work_seconds,
            timeout=1800,
        )
    show([max(row, key=lambda t: t.total) for row in zip(*ranks, strict=True)])


def show(timings: list[Timing]) -> None:
    """Medians over the rounds, and of the ratios within a round."""
    by_kind = {kind: [t for t in timings if t.kind == kind] for kind in KINDS}
    table = Table("save", "blocked s", "work and save s", "cost s")
    pairs = list(zip(*(by_kind[kind] for kind in KINDS), strict=True))
    for place, kind in enumerate(KINDS):
        table.add_row(
            kind,
            f"{statistics.median(t.blocked for t in by_kind[kind]):.3f}",
            f"{statistics.median(t.total for t in by_kind[kind]):.2f}",
            f"{statistics.median(p[place].total - p[0].total for p in pairs):.2f}",
        )
    console = Console()
    console.print(table)
    blocked = [background.blocked / waited.blocked for _, waited, background in pairs]
    console.print(
        f"background / waited, time inside the call: median {statistics.median(blocked):.1%}, "
        f"{min(blocked):.1%} to {max(blocked):.1%}"
    )


if __name__ == "__main__":
    main()
