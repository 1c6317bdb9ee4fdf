"""Seconds of a step, by part, from rates of a machine.

What runs beside what, by rule: gathers of weights beside the forward pass, reductions of gradients
beside the backward pass they are made in, each second of which hides one second of every link; what
exceeds the computing, and one unit's share that nothing is left to hide behind, is waited for.
Exchanges within layers (keys and values, tokens to experts), the norm's reduction, Muon and AdamW
run alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from zaya_kernels.dtypes import DTYPES

from zaya_train.model.flops import Work, forward_flops
from zaya_train.model.shapes import parameter_shapes
from zaya_train.optim.owners import traffic
from zaya_train.parallel.traffic import Flow
from zaya_train.planning.activations import layer_parts, total
from zaya_train.planning.exchange import bus_factor, group_of, seconds_of, spans_nodes
from zaya_train.planning.muon import muon_plan
from zaya_train.planning.weights import weights_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zaya_train.config.derive import Layout
    from zaya_train.config.schema import ModelConfig
    from zaya_train.model.flops import ForwardFlops
    from zaya_train.planning.case import Case
    from zaya_train.planning.machine import Machine

MOVES = 6
"""Times that a byte kept for the backward pass is moved: written and read in both passes, with its
gradient. Assumed."""
FP8_UNKNOWN = "; experts in fp8 as in bf16, no rate of theirs is known"
_FP32 = 4


@dataclass(frozen=True)
class Term:
    """A part of a step's seconds."""

    name: str
    seconds: float
    formula: str
    """With its numbers."""
    source: str


@dataclass(frozen=True)
class StepTime:
    """A step of one phase."""

    case: Case
    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)

    @property
    def tokens_per_second(self) -> float:
        return self.case.phase.global_batch_tokens / self.seconds


def pairs_of(case: Case, document_tokens: float) -> float:
    """Pairs of a query and a key of a micro-batch on one rank, in documents of this length."""
    return case.tokens * (min(document_tokens, case.phase.context_tokens) + 1) / 2


def work_of(case: Case, document_tokens: float) -> ForwardFlops:
    """Forward operations of one micro-batch on one rank; every token has a label."""
    work = Work(
        tokens=case.tokens,
        expert_tokens=case.model.num_layers * case.received,
        pairs=round(pairs_of(case, document_tokens)),
        supervised=case.tokens,
    )
    return forward_flops(case.model, work)


def step_time(case: Case, machine: Machine, document_tokens: float) -> StepTime:
    """Of a full step of `case`, whose documents have `document_tokens` on average over tokens."""
    terms = _computing(case, machine, work_of(case, document_tokens))
    computing = sum(term.seconds for term in terms)
    terms += _weights(case, machine, computing)
    terms += _exchanges(case, machine)
    terms += _optimizer(case, machine)
    return StepTime(case, tuple(term for term in terms if term.seconds))


def plan_seconds(cases: Sequence[Case], machine: Machine) -> float:
    """Of all steps of `cases`, phases of a plan: full batches of documents as long as contexts."""
    return sum(
        step_time(case, machine, case.phase.context_tokens).seconds
        * case.phase.tokens
        / case.phase.global_batch_tokens
        for case in cases
    )


def _computing(case: Case, machine: Machine, forward: ForwardFlops) -> list[Term]:
    micro, recompute = case.micro_batches, case.parallel.recompute
    products = forward.total - forward.attention
    small = forward.depthwise_convolution + forward.grouped_convolution + forward.router
    again = {
        "none": (0, 0),
        "selective": (small, 0),
        "full": (products - forward.head, forward.attention),
    }[recompute]
    kept = total(layer_parts(case)) * case.model.num_layers
    moved = micro * kept * (MOVES + (2 if recompute == "full" else recompute == "selective"))
    rows = (
        ("products", 3 * products, machine.products),
        ("attention", 3 * forward.attention, machine.attention),
        ("products again", again[0], machine.products),
        ("attention again", again[1], machine.attention),
    )
    fp8 = FP8_UNKNOWN if case.config.precision.expert_dtype == "fp8" else ""
    terms = [
        Term(
            name,
            micro * flops / rate.value,
            f"{micro:,} x {flops / 1e12:,.4g} TFLOP / {rate.value / 1e12:,.4g} TFLOP/s",
            rate.source + (fp8 if "products" in name else ""),
        )
        for name, flops, rate in rows
    ]
    speed = machine.copies.value
    formula = f"{moved / 1e9:,.4g} GB / {speed / 1e9:,.4g} GB/s, kept bytes x {MOVES} or more"
    return [*terms, Term("elementwise", moved / speed, formula, machine.copies.source)]


def _weights(case: Case, machine: Machine, computing: float) -> list[Term]:
    """What is waited for of gathers and reductions, `computing` being a step's seconds.

    Assumed: exchanges over one link run one after another and over the two links side by side, so
    that a second of computing hides one second of each; gathers come first.
    """
    flows = [f for f in case.traffic().flows() if "weights" in f.what]
    room = _rooms(case, computing)
    terms = []
    for kind, name in (
        ("all_gather", "weights gathered"),
        ("reduce_scatter", "gradients reduced"),
        ("all_reduce", "gradients between replicas"),
    ):
        own = [flow for flow in flows if flow.kind == kind]
        times = [seconds_of(flow, case.layout, machine) for flow in own]
        seconds, hidden = sum(times), 0.0
        for flow, each in zip(own, times, strict=True):
            links = spans_nodes(group_of(flow.axis, case.layout, machine.node_ranks))
            for window, share in _windows(case, kind).items():
                found = min(each * share, room[links, window])
                room[links, window] -= found
                hidden += found
        calls = max((flow.calls for flow in own), default=1)
        units = calls // (case.model.num_layers + 1) or 1
        alone = seconds / calls * units
        waited = max(alone, seconds - hidden)
        formula = f"{seconds:.4g} s, {hidden:.4g} s of it beside computing, {alone:.4g} s alone"
        terms.append(Term(name, waited, formula, _links(machine)))
    return terms


def _rooms(case: Case, computing: float) -> dict[tuple[bool, str], float]:
    """(between nodes, window) -> seconds of computing there: forward passes, of which without
    reshard_after_forward only the first gathers, the backward pass of the last micro-batch, and
    those before it. Forward passes are a third of the computing."""
    micro = case.micro_batches
    forwards = 1 if case.parallel.reshard_after_forward else 1 / micro
    windows = {
        "forward": computing / 3 * forwards,
        "last": computing * 2 / 3 / micro,
        "earlier": computing * 2 / 3 * (micro - 1) / micro,
    }
    return {(link, name): room for link in (False, True) for name, room in windows.items()}


def _windows(case: Case, kind: str) -> dict[str, float]:
    """Where exchanges of a kind run, as shares of their seconds."""
    micro, mode = case.micro_batches, case.parallel.accumulation
    every = {"last": 1 / micro, "earlier": (micro - 1) / micro}
    if kind == "all_gather":
        if not case.parallel.reshard_after_forward:
            return {"forward": 1.0}
        return {"forward": 0.5} | {window: share / 2 for window, share in every.items()}
    scatters = kind == "reduce_scatter" and mode != "keep_unsharded"
    return every if scatters or mode == "reduce_each" else {"last": 1.0}


def _exchanges(case: Case, machine: Machine) -> list[Term]:
    rest = [flow for flow in case.traffic().flows() if "weights" not in flow.what]
    names = {"context": "keys, values and halos", "expert": "tokens to experts", "world": "sums"}
    return [
        Term(
            names[axis],
            sum(seconds_of(f, case.layout, machine) for f in rest if f.axis == axis),
            f"{sum(f.bytes for f in rest if f.axis == axis) / 1e6:,.4g} MB in "
            f"{sum(f.calls for f in rest if f.axis == axis):,} calls",
            _links(machine),
        )
        for axis in names
    ]


def _links(machine: Machine) -> str:
    inside, between = machine.inside, machine.between
    return (
        f"{inside.bytes_per_second / 1e9:,.4g} GB/s in a node ({inside.source}), "
        f"{between.bytes_per_second / 1e9:,.4g} between ({between.source})"
    )


class MuonWork(NamedTuple):
    """Of the rank that has most."""

    flops: int
    to_owners: int
    """Elements sent within the replica, in fp32."""
    from_owners: int
    """Elements sent back."""
    to_replicas: int
    rounds: int


@lru_cache(maxsize=64)
def muon_work(model: ModelConfig, grid: tuple[int, int, int]) -> MuonWork:
    """grid: replicas, shards, expert ranks."""
    made = muon_plan(parameter_shapes(model), *grid)
    loads = made.loads
    busiest = max(loads, key=lambda owner: loads[owner])
    return MuonWork(loads[busiest], *traffic(made, busiest), len(made.rounds))


def muon_flows(case: Case) -> list[Flow]:
    """What the busiest rank sends for Muon in a step, its own part not counted."""
    degrees, muon = case.layout, case.config.optim.muon
    work = muon_work(case.model, (degrees.replicate, degrees.fsdp, degrees.expert))
    size = DTYPES[muon.newton_schulz_dtype].itemsize
    near = work.to_owners * _FP32 + work.from_owners * size
    far = work.to_replicas * size
    rows = (("within a replica", "fsdp", near, 2), ("to replicas", "replicate", far, 1))
    return [
        Flow(f"Muon, {what}", "all_to_all", axis, moved, calls * work.rounds)
        for what, axis, moved, calls in rows
        if moved
    ]


def _with_own(flow: Flow, degrees: Layout) -> Flow:
    """With the part that stays, which `seconds_of` takes off."""
    ranks: int = getattr(degrees, flow.axis)
    return replace(flow, bytes=round(flow.bytes / bus_factor(flow.kind, ranks)))


def _optimizer(case: Case, machine: Machine) -> Iterable[Term]:
    degrees = case.layout
    work = muon_work(case.model, (degrees.replicate, degrees.fsdp, degrees.expert))
    rate = machine.by_dtype[case.config.optim.muon.newton_schulz_dtype]
    formula = f"{work.flops / 1e12:,.4g} TFLOP / {rate.value / 1e12:,.4g} TFLOP/s"
    yield Term("Muon", work.flops / rate.value, formula, rate.source)
    flows = muon_flows(case)
    seconds = sum(seconds_of(_with_own(flow, degrees), degrees, machine) for flow in flows)
    sent = f"{sum(flow.bytes for flow in flows) / 1e6:,.4g} MB"
    yield Term("Muon, updates sent", seconds, sent, _links(machine))
    local = weights_of(case.model, degrees).local
    # Norm, weight, gradient and two moments, read and written.
    moved = 8 * _FP32 * local
    formula = f"{moved / 1e9:,.4g} GB / {machine.copies.value / 1e9:,.4g} GB/s"
    yield Term("norm and update", moved / machine.copies.value, formula, machine.copies.source)
