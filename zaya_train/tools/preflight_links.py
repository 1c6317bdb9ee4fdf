"""Ranks together: the collectives of training over message sizes, checked to the bit, and links
between nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from zaya_train.planning.exchange import bus_factor
from zaya_train.tools.preflight_compute import best_seconds
from zaya_train.tools.preflight_findings import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zaya_train.tools.preflight_compute import Sizes
    from zaya_train.tools.preflight_findings import Place

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")


@dataclass(frozen=True)
class Curve:
    """One collective of one size over one group of ranks; GB/s is bus bandwidth, as nccl-tests
    define it: what the slowest link carries, comparable between group sizes."""

    scope: str
    """node, between nodes, or world."""
    collective: str
    message_kib: int
    ranks: int
    gb_per_second: float


def node_groups(places: Sequence[Place]) -> list[list[int]]:
    """Ranks of each node, nodes in order of their first rank."""
    nodes = list(dict.fromkeys(place.node for place in places))
    return [[p.rank for p in places if p.node == node] for node in nodes]


def rails(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ranks of one place in every node: what HSDP's replicas are."""
    return [list(ranks) for ranks in zip(*groups, strict=False)]


@dataclass(frozen=True)
class Scope:
    """The group this rank is in for one kind of group."""

    name: str
    ranks: list[int]
    group: dist.ProcessGroup


def scopes(places: Sequence[Place], rank: int) -> list[Scope]:
    """Collective: makes the process groups. Kinds with one rank are left out."""
    nodes = node_groups(places)
    found = []
    kinds = [("node", nodes), ("between nodes", rails(nodes) if len(nodes) > 1 else [])]
    for name, groups in kinds:
        for ranks in groups:
            # Everybody takes part in making every group.
            group = dist.new_group(ranks)
            if rank in ranks and len(ranks) > 1 and group is not None:
                found.append(Scope(name, ranks, group))
    everyone = [place.rank for place in places]
    if len(nodes) > 1 and len(everyone) > len(nodes):
        found.append(Scope("world", everyone, dist.distributed_c10d._get_default_group()))
    return found


def run_scope(
    scope: Scope, places: Sequence[Place], rank: int, device: torch.device, sizes: Sizes
) -> tuple[list[Curve], list[Finding]]:
    """Collective within the scope's group: every collective at every size.

    Wrong data is laid to the rank it came from where the collective tells, else to nobody.
    """
    curves, findings = [], []
    for collective in COLLECTIVES:
        wrong: dict[int | None, str] = {}
        for kib in sizes.messages_kib:
            work = Work(collective, scope, rank, device, kib)
            # Called on every rank, whatever it has seen so far: it is a collective.
            found = work.wrong()
            wrong = wrong or found
            seconds = best_seconds(work.run, device, sizes.repeats)
            rate = work.bytes / seconds / 1e9 * bus_factor(collective, len(scope.ranks))
            curves.append(Curve(scope.name, collective, kib, len(scope.ranks), rate))
        check = f"{collective}, {scope.name}"
        rule = f"exact on {len(scope.ranks)} ranks, {len(sizes.messages_kib)} sizes"
        for source, text in wrong.items():
            blamed: str | Place = "all" if source is None else places[source]
            findings.append(Finding.judged(check, blamed, False, f"{text}, on rank {rank}", rule))
        if not wrong:
            top = max(c.gb_per_second for c in curves if c.collective == collective)
            value = f"up to {top:,.3g} GB/s"
            findings.append(Finding.judged(check, places[rank], True, value, rule))
    return curves, findings


class Work:
    """One collective with its buffers. Rank r of the group contributes values only it has, so that
    a wrong result tells whose part is wrong."""

    def __init__(
        self, collective: str, scope: Scope, rank: int, device: torch.device, kib: int
    ) -> None:
        self._scope, self._collective = scope, collective
        self._index, self._size = scope.ranks.index(rank), len(scope.ranks)
        # Whole slices for every rank.
        per_rank = max(1, kib * 256 // self._size)
        whole = per_rank * self._size
        self.bytes = whole * 4
        short, full = (per_rank,), (whole,)
        given = short if collective == "all_gather" else full
        taken = short if collective == "reduce_scatter" else full
        self._given = torch.full(given, float(self._index + 1), device=device)
        self._taken = torch.zeros(taken, device=device)
        if collective == "all_to_all":
            self._given.view(self._size, -1).add_(
                1000.0 * torch.arange(self._size, device=device)[:, None]
            )

    def run(self) -> None:
        """Once, into the same buffers."""
        group = self._scope.group
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(self._taken.copy_(self._given), group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_single(
                self._taken, self._given, group=group
            ),
            "all_gather": lambda: dist.all_gather_single(self._taken, self._given, group=group),
            "all_to_all": lambda: dist.all_to_all_single(self._taken, self._given, group=group),
        }
        calls[self._collective]()

    def wrong(self) -> dict[int | None, str]:
        """Run once and compare with what must come out: what is wrong by the rank whose part it is,
        None where sums do not tell. Empty if all is right."""
        self.run()
        size = self._size
        if self._collective in ("all_reduce", "reduce_scatter"):
            want = size * (size + 1) / 2
            bad = int((self._taken != want).sum())
            text = f"{bad} of {self._taken.numel()} sums are not {want:g}"
            return {None: text} if bad else {}
        want_rows = torch.arange(1.0, size + 1, device=self._taken.device)
        if self._collective == "all_to_all":
            want_rows = want_rows + 1000.0 * self._index
        counts = (self._taken.view(size, -1) != want_rows[:, None]).sum(1).tolist()
        return {
            self._scope.ranks[index]: f"{count} wrong values from rank {self._scope.ranks[index]}"
            for index, count in enumerate(counts)
            if count
        }


def pairings(nodes: int) -> list[list[tuple[int, int]]]:
    """Two rounds in which every node has another partner in each, or the same where there is but
    one: neighbours on a ring."""
    if nodes < 2:
        return []
    ring = [(i, (i + 1) % nodes) for i in range(nodes)]
    even, odd = ring[0::2], ring[1::2]
    if nodes % 2:
        # The ring's last pair shares the first node with the first pair: a round of its own.
        return [even[:-1], odd, [even[-1]]]
    return [even, odd] if nodes > 2 else [even]


def pair_rates(
    places: Sequence[Place], rank: int, device: torch.device, sizes: Sizes
) -> dict[tuple[str, str], float]:
    """Collective: GB/s between nodes that are neighbours on a ring, all ranks of a node to their
    partners at once, the slowest rank of each pair counting."""
    groups = node_groups(places)
    names = [places[ranks[0]].node for ranks in groups]
    buffer = torch.zeros(sizes.messages_kib[-1] * 256, device=device)
    taken = torch.empty_like(buffer)
    mine: dict[tuple[str, str], float] = {}
    for round_ in pairings(len(groups)):
        partner = _partner(round_, groups, rank)
        dist.barrier()
        if partner is None:
            continue
        pair, other = partner

        def exchange(other: int = other) -> None:
            sends = [dist.P2POp(dist.isend, buffer, other), dist.P2POp(dist.irecv, taken, other)]
            # One order on both sides, or two sends could wait for each other.
            for request in dist.batch_isend_irecv(sends):
                request.wait()

        seconds = best_seconds(exchange, device, sizes.repeats)
        mine[(names[pair[0]], names[pair[1]])] = buffer.numel() * 4 / seconds / 1e9
    everyone: list[dict[tuple[str, str], float]] = [{}] * len(places)
    dist.all_gather_object(everyone, mine)
    rates: dict[tuple[str, str], float] = {}
    for rank_rates in everyone:
        for names_pair, rate in rank_rates.items():
            rates[names_pair] = min(rate, rates.get(names_pair, rate))
    return rates


def _partner(
    round_: Sequence[tuple[int, int]], groups: Sequence[Sequence[int]], rank: int
) -> tuple[tuple[int, int], int] | None:
    for pair in round_:
        one, other = (groups[node] for node in pair)
        for left, right in zip(one, other, strict=False):
            if rank in (left, right):
                return pair, right if rank == left else left
    return None
