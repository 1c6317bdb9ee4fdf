"""Bytes of every collective of a step, counted, against the arithmetic; and balanced attention."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from zaya_kernels.attention.segments import key_query_pairs

from tests.dist.harness import ROWS, Case, Setup, rows_of_step
from tests.helpers import traffic
from tests.helpers.distributed import run_ranks
from zaya_train.model import SequenceLayout
from zaya_train.parallel.sequence import Chunking
from zaya_train.parallel.traffic import Traffic, Work

if TYPE_CHECKING:
    from zaya_train.model.interfaces import Route
    from zaya_train.parallel.experts import AllToAllDispatcher
    from zaya_train.parallel.mesh import Mesh

LAYERS = 2
Totals = dict[tuple[str, tuple[int, ...]], int]
"""Bytes by kind of collective and ranks of the group."""


def ranks_of(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Ranks of this rank's group along every axis. Axes may coincide: torch gives one group to
    equal sets of ranks, and bytes along them add up."""
    views = [view for view in (mesh.device_mesh, mesh.sharding, mesh.sparse) if view is not None]
    found = {"world": tuple(range(dist.get_world_size()))}
    for view in views:
        for axis in view.mesh_dim_names or ():
            found[axis] = tuple(dist.get_process_group_ranks(view.get_group(axis)))
    return found


def summed(rows: Any) -> Totals:
    totals: Totals = defaultdict(int)
    for key, size in rows:
        totals[key] += size
    return dict(totals)


class Sent:
    """Tokens that the dispatcher's routes send and receive."""

    def __init__(self, dispatcher: AllToAllDispatcher) -> None:
        self.tokens = [0, 0]
        self.inner = dispatcher.route
        dispatcher.route = self.route  # type: ignore[assignment, method-assign]

    def route(self, *arguments: Any) -> Route:
        route = self.inner(*arguments)
        self.tokens[0] += sum(route.handle.sends)
        self.tokens[1] += sum(route.handle.receives)
        return route


def _nothing(*_: Any) -> None:
    pass


def counted_and_calculated(case: Case) -> tuple[Totals, Totals, float, list[int]]:
    setup = Setup.of(case)
    # Muon's exchange has tests of its own.
    setup.optimizer.step = _nothing  # type: ignore[method-assign, assignment]
    setup.step(0)
    sent = Sent(setup.model.around.dispatcher) if case.expert > 1 else None  # type: ignore[arg-type]
    groups = ranks_of(setup.mesh)
    with traffic.Traffic() as counted:
        result = setup.step(0)
    work = Work(
        micro_batches=len(setup.first_rows),
        rows=case.micro_rows,
        row_tokens=case.row_tokens,
        sent_tokens=sent.tokens[0] if sent else 0,
        received_tokens=sent.tokens[1] if sent else 0,
    )
    config = setup.config
    flows = Traffic(
        config.model, config.parallel, config.precision, setup.mesh.layout, work
    ).flows()
    calculated = summed(((flow.kind, groups[flow.axis]), flow.bytes) for flow in flows)
    found = summed((key, sum(sizes)) for key, sizes in counted.operands.items())
    routed = float(result.load[:, : case.experts].sum())
    return found, calculated, routed, sent.tokens if sent else []


CASES = [
    Case(shard=2),
    Case(shard=2, reshard=True, accumulation="all_reduce_last", experts=3),
    Case(2, 1),
    Case(2, 2, accumulation="reduce_each"),
    Case(2, 2, expert=2),
    Case(shard=2, context=2, expert=2, accumulation="all_reduce_last"),
    Case(2, 1, 2, 2, reshard=True),
    Case(2, 1, 2, 2, recompute="selective"),
    Case(context=4, expert=4, micro_rows=2, recompute="full"),
    Case(shard=2, context=2, expert=2, recompute="full", reshard=True),
    Case(context=4, micro_rows=ROWS, chunks="contiguous"),
    Case(2, 2, accumulation="reduce_each", compute="bf16"),
    Case(shard=2, context=2, expert=2, reshard=True, compute="bf16"),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_counted_bytes_are_the_calculated_ones(case: Case) -> None:
    ranks = run_ranks(counted_and_calculated, case.world, case)
    for counted, calculated, _, _ in ranks:
        assert counted == calculated
    if case.expert > 1:
        sent, received = (sum(rank[3][i] for rank in ranks) for i in (0, 1))
        # The load leaves padding out, which travels too.
        padding = sum(case.row_tokens - int(r.document_lengths.sum()) for r in rows_of_step(0))
        assert ranks[0][2] <= sent == received <= ranks[0][2] + padding * LAYERS


def reduced_dtypes(case: Case) -> tuple[set[torch.dtype], int, int]:
    """Of a step's reduce-scatters: dtypes, bytes, and the model's elements."""
    setup = Setup.of(case)
    with traffic.Traffic() as counted:
        setup.step(0)
    elements = sum(p.numel() for p in setup.model.parameters())
    return counted.dtypes["reduce_scatter"], counted.sent_bytes("reduce_scatter"), elements


@pytest.mark.parametrize("case", [Case(shard=2, compute="bf16"), Case(2, 2, compute="bf16")])
def test_gradients_of_a_bf16_model_are_reduced_in_fp32(case: Case) -> None:
    for dtypes, size, elements in run_ranks(reduced_dtypes, case.world, case):
        assert dtypes == {torch.float32}
        # More by the padding to equal rows.
        assert 4 * elements <= size < 4.4 * elements


@pytest.mark.parametrize(("head_tail", "worst"), [(True, 1.05), (False, 1.8)])
def test_attention_work_of_one_long_document_at_degree_8(head_tail: bool, worst: float) -> None:
    chunking, row_tokens = Chunking(8, head_tail), 4096
    pairs = []
    for rank in range(8):
        ranges = chunking.ranges_of(rank, row_tokens)
        layout = SequenceLayout.of_documents(
            [[row_tokens]], row_tokens, torch.device("cpu"), ranges
        )
        pairs.append(key_query_pairs(layout.attention))
    assert sum(pairs) == row_tokens * (row_tokens + 1) // 2
    slowest = max(pairs) / (sum(pairs) / 8)
    assert slowest < worst if head_tail else slowest > worst
