"""Seconds of collectives: latency by hops, bytes by the bus bandwidth of the slowest link.

    seconds = calls x hops x latency + bytes x factor / bandwidth

factor: what each rank's link carries of the whole buffer, (n - 1) / n, twice that for an all-reduce
(nccl-tests, PERFORMANCE.md). A group over several nodes has as many adapters as it has ranks in a
node, for rings; in an all-to-all everything goes through each rank's own. Where devices are joined
pairwise (xGMI), n of a node use n - 1 links of each; through a switch (NVLink), all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zaya_train.config.derive import Layout
    from zaya_train.parallel.traffic import Flow
    from zaya_train.planning.machine import Machine


def bus_factor(collective: str, ranks: int) -> float:
    """Bus over algorithm bandwidth (nccl-tests, PERFORMANCE.md)."""
    share = (ranks - 1) / ranks
    return 2 * share if collective == "all_reduce" else share


def hops(ranks: int) -> int:
    """One after another in a call."""
    return max(1, math.ceil(math.log2(ranks)))


@dataclass(frozen=True)
class Group:
    """Ranks of one axis, as they lie in nodes."""

    ranks: int
    in_node: int
    """Of them, on one node."""


def group_of(axis: str, degrees: Layout, node_ranks: int) -> Group:
    """The group of `axis` on nodes of `node_ranks`; world ranks are numbered node by node."""
    stride = {
        "replicate": degrees.fsdp, "shard": degrees.context, "expert_shard": degrees.expert,
    }.get(axis, 1)  # fmt: skip
    size: int = getattr(degrees, axis)
    return Group(size, max(1, min(size, node_ranks // stride)))


def spans_nodes(group: Group) -> bool:
    """Whether adapters carry what it exchanges."""
    return group.in_node < group.ranks


def _inside_rate(machine: Machine, ranks: int) -> float:
    """Of one device to the others of `ranks` on its node; one alone has none to send to there."""
    link = machine.inside
    if ranks == 1:
        return math.inf
    share = 1.0 if link.peers is None else min(1.0, (ranks - 1) / link.peers)
    return link.bytes_per_second * share


def seconds_of(flow: Flow, degrees: Layout, machine: Machine) -> float:
    """Of all calls of a step."""
    group = group_of(flow.axis, degrees, machine.node_ranks)
    if group.ranks == 1:
        return 0.0
    rate, hop = _inside_rate(machine, group.in_node), machine.inside.hop_seconds
    if spans_nodes(group):
        adapters = 1 if flow.kind == "all_to_all" else group.in_node
        rate = min(rate, adapters * machine.between.bytes_per_second)
        hop = machine.between.hop_seconds
    whole = flow.bytes * group.ranks if flow.kind == "all_gather" else flow.bytes
    carried = whole * bus_factor(flow.kind, group.ranks)
    return flow.calls * hops(group.ranks) * hop + carried / rate
