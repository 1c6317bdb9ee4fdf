"""Muon's plan for the 8.8B model on 8, 128 and 1,024 ranks.

    PYTHONPATH=.:kernels python -m tests.helpers.muon_table

records it in tests/golden/muon_owners.json and prints the table of docs/muon.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_train.main import compose
from zaya_train.model.shapes import parameter_shapes
from zaya_train.optim.owners import least_load, traffic
from zaya_train.planning.muon import muon_plan

if TYPE_CHECKING:
    from collections.abc import Mapping

GOLDEN = Path(__file__).parents[1] / "golden" / "muon_owners.json"
GRIDS = ((1, 8), (16, 8), (128, 8))
FP32_BYTES, BF16_BYTES = 4, 2


@dataclass(frozen=True)
class Row:
    """One number of ranks; operations of Newton-Schulz per step, bytes sent per step."""

    replicas: int
    shards: int
    matrices: int
    total_flops: int
    largest_flops: int
    slowest_rank_flops: int
    over_simple_bound: float
    """Slowest over the larger of the mean and the largest matrix."""
    over_least: float
    """Slowest over the least that any assignment of whole matrices reaches, from below."""
    rounds: int
    moved_experts: int
    largest_shard_bytes: int
    """Sent within a replica by the rank that sends most."""
    largest_replicate_bytes: int


def shapes_of_8b() -> Mapping[str, tuple[int, ...]]:
    return parameter_shapes(compose(["recipe=zaya1_8b"]).model)


def row(shapes: Mapping[str, tuple[int, ...]], replicas: int, shards: int) -> Row:
    made = muon_plan(shapes, replicas, shards)
    costs = [matrix.flops() for matrix in made.matrices]
    slowest = max(made.loads.values())
    sent = [traffic(made, rank) for rank in made.loads]
    experts = [i for i, matrix in enumerate(made.matrices) if matrix.home is not None]
    return Row(
        replicas=replicas,
        shards=shards,
        matrices=len(costs),
        total_flops=sum(costs),
        largest_flops=max(costs),
        slowest_rank_flops=slowest,
        over_simple_bound=round(slowest / max(sum(costs) / len(sent), max(costs)), 4),
        over_least=round(slowest / least_load(costs, len(sent)), 4),
        rounds=len(made.rounds),
        moved_experts=sum(made.moves(i) for i in experts),
        largest_shard_bytes=max(
            t.to_owners * FP32_BYTES + t.from_owners * BF16_BYTES for t in sent
        ),
        largest_replicate_bytes=max(t.to_replicas * BF16_BYTES for t in sent),
    )


def markdown(rows: list[Row]) -> str:
    """The table of docs/muon.md."""
    lines = [
        "| ranks | replicas x shards | mean GFLOP | slowest rank GFLOP | over max(mean, largest) |"
        " over the least possible | MB within the replica | MB to replicas |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        ranks = r.replicas * r.shards
        lines.append(
            f"| {ranks:,} | {r.replicas} x {r.shards} | {r.total_flops / ranks / 1e9:,.1f} |"
            f" {r.slowest_rank_flops / 1e9:,.1f} | {r.over_simple_bound:.3f} |"
            f" {r.over_least:.3f} | {r.largest_shard_bytes / 1e6:,.1f} |"
            f" {r.largest_replicate_bytes / 1e6:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    shapes = shapes_of_8b()
    rows = [row(shapes, *grid) for grid in GRIDS]
    GOLDEN.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
