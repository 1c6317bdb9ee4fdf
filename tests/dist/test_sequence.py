"""Context-parallel exchange and chunking alone, against slices of the full row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.distributed import RankError, run_ranks
from zaya_train.parallel.collectives import row_counts
from zaya_train.parallel.sequence import Chunking, SharedRows, local_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BATCH, CHANNELS = 2, 3
CPU = torch.device("cpu")
CHUNKINGS = [(1, True), (2, True), (2, False), (4, True), (4, False)]


def world() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def full_row(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, tokens, CHANNELS, generator=generator, dtype=torch.float64)


def weights(shape: torch.Size, seed: int) -> Tensor:
    """Upstream gradients, other ones on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def halo_of_full(row: Tensor, chunking: Chunking, rank: int, rows: int) -> Tensor:
    """[B, c, rows, C] by slicing the row behind `rows` zeros."""
    padded = torch.cat([row.new_zeros(BATCH, rows, CHANNELS), row], dim=1)
    starts = [start for start, _ in chunking.ranges_of(rank, row.shape[1])]
    return torch.stack([padded[:, start : start + rows] for start in starts], dim=1)


def exchange_on_rank(head_tail: bool, tokens: int, rows: int) -> dict[str, float]:
    """Largest differences of gather and halo, values and gradients."""
    group = world()
    rank, ranks = group.rank(), group.size()
    chunking = Chunking(ranks, head_tail)
    exchange = SharedRows(group, chunking, CPU)
    row = full_row(tokens)
    mine = local_part(row, chunking, rank).requires_grad_()
    keys, values = exchange.gather(mine, 3 * mine)
    halo = exchange.halo(mine, rows)
    seeds = range(ranks)
    joined = keys * weights(keys.shape, rank) + values / 3 * weights(values.shape, rank)
    torch.autograd.backward(joined.sum(), retain_graph=True)
    assert mine.grad is not None
    gather_grad, mine.grad = mine.grad / 2, None
    torch.autograd.backward((halo * weights(halo.shape, 10 + rank)).sum())

    whole = row.clone().requires_grad_()
    loss = torch.stack([(whole * weights(row.shape, r)).sum() for r in seeds]).sum()
    torch.autograd.backward(loss)
    assert whole.grad is not None
    expected_gather_grad, whole.grad = local_part(whole.grad, chunking, rank), None
    halos = [halo_of_full(whole, chunking, r, rows) for r in seeds]
    upstream = [(h * weights(h.shape, 10 + r)).sum() for r, h in enumerate(halos)]
    torch.autograd.backward(torch.stack(upstream).sum())
    assert mine.grad is not None
    return {
        "gathered keys": float((keys - row).abs().max()),
        "gathered values": float((values - 3 * row).abs().max()),
        "halo": float((halo - halos[rank]).abs().max()) if rows else 0.0,
        "gather's gradient": float((gather_grad - expected_gather_grad).abs().max()),
        "halo's gradient": float((mine.grad - local_part(whole.grad, chunking, rank)).abs().max()),
    }


@pytest.mark.parametrize(("ranks", "head_tail"), CHUNKINGS)
def test_exchange_equals_slices_of_the_row(ranks: int, head_tail: bool) -> None:
    for errors in run_ranks(exchange_on_rank, ranks, head_tail, 32, 3):
        assert {name: e for name, e in errors.items() if e > 1e-12} == {}


def errors_in_bf16(head_tail: bool) -> tuple[float, float, float]:
    """Of the gradients of gathered bf16 keys: largest error against the sum in float64, in units of
    the result's last place; its mean; the mean of a reduce-scatter in bf16."""
    group = world()
    rank, ranks = group.rank(), group.size()
    chunking = Chunking(ranks, head_tail)
    tokens = 128 * ranks
    upstream = [weights(torch.Size((1, tokens, 2, 4)), r).bfloat16() for r in range(ranks)]
    mine = local_part(upstream[0], chunking, rank).clone().requires_grad_()
    keys, values = SharedRows(group, chunking, CPU).gather(mine, torch.zeros_like(mine))
    torch.autograd.backward((keys * upstream[rank]).float().sum() + values.float().sum())
    assert mine.grad is not None and mine.grad.dtype == torch.bfloat16
    exact = local_part(torch.stack(upstream).double().sum(dim=0), chunking, rank)
    place = torch.exp2(exact.abs().clamp_min(2**-20).log2().floor() - 7)
    ours = (mine.grad.double() - exact).abs() / place
    reduced = torch.empty_like(mine.detach())
    parts = [local_part(upstream[rank], chunking, r) for r in range(ranks)]
    dist.reduce_scatter_single(reduced, torch.cat(parts), group=group)
    theirs = (reduced.view_as(mine).double() - exact).abs() / place
    return float(ours.max()), float(ours.mean()), float(theirs.mean())


@pytest.mark.parametrize("head_tail", [True, False])
def test_gradients_of_gathered_bf16_keys_are_rounded_once(head_tail: bool) -> None:
    for largest, mean, in_bf16 in run_ranks(errors_in_bf16, 4, head_tail):
        # Half a unit in the last place is what one rounding costs; a quarter on average.
        assert largest <= 0.5
        assert mean < 0.6 * in_bf16


def chunks_as_long_as_the_halo() -> dict[str, float]:
    return exchange_on_rank(True, 8, 2)


def test_a_chunk_may_be_as_short_as_the_halo() -> None:
    for errors in run_ranks(chunks_as_long_as_the_halo, 2):
        assert max(errors.values()) < 1e-12


def too_short() -> None:
    SharedRows(world(), Chunking(2, True), CPU).halo(torch.zeros(1, 4, 1), 3)


def test_a_chunk_shorter_than_the_halo_is_an_error() -> None:
    with pytest.raises(RankError, match="chunks of 2 tokens are shorter than the halo of 3"):
        run_ranks(too_short, 2)


def no_halo() -> tuple[int, ...]:
    return tuple(SharedRows(world(), Chunking(2, True), CPU).halo(torch.zeros(2, 4, 3), 0).shape)


def test_no_rows_asked_no_rows_given() -> None:
    assert run_ranks(no_halo, 2) == [(2, 2, 0, 3)] * 2


@pytest.mark.parametrize(("ranks", "head_tail"), CHUNKINGS)
def test_chunks_partition_the_row(ranks: int, head_tail: bool) -> None:
    chunking = Chunking(ranks, head_tail)
    tokens = [
        t
        for rank in range(ranks)
        for start, end in chunking.ranges_of(rank, 32)
        for t in range(start, end)
    ]
    assert sorted(tokens) == list(range(32))
    assert sorted(chunking.order()) == list(range(ranks * chunking.per_rank))


def test_head_tail_evens_out_causal_work() -> None:
    def work(chunking: Chunking, rank: int) -> int:
        return sum(sum(range(start, end)) for start, end in chunking.ranges_of(rank, 64))

    balanced = [work(Chunking(4, True), rank) for rank in range(4)]
    assert len(set(balanced)) == 1
    assert len({work(Chunking(4, False), rank) for rank in range(4)}) == 4


def test_local_part_keeps_the_order_of_chunks() -> None:
    row = torch.arange(16).view(1, 16)
    assert local_part(row, Chunking(2, True), 0).tolist() == [[0, 1, 2, 3, 12, 13, 14, 15]]
    assert local_part(row, Chunking(2, True), 1).tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert local_part(row, Chunking(2, False), 1).tolist() == [list(range(8, 16))]


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 6, 7, 8, 61])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_row_counts_are_torchs_chunks(rows: int, ranks: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)] if rows else []
    assert row_counts(rows, ranks) == chunks + [0] * (ranks - len(chunks))
