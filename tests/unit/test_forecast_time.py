"""Forecast time: bytes and calls against counted ones, sums by hand, what calibrating recovers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.helpers import rehearsal_table
from tests.helpers.tiny import tiny
from zaya_train.config.derive import Layout, layout
from zaya_train.main import compose, main
from zaya_train.parallel.mesh import Mesh
from zaya_train.parallel.traffic import Flow
from zaya_train.planning.case import Case
from zaya_train.planning.checkpoint import checkpoint_bytes, host_bytes
from zaya_train.planning.exchange import group_of, seconds_of
from zaya_train.planning.machine import Link, machine_of, with_links
from zaya_train.planning.time import muon_flows, muon_work, plan_seconds, step_time, work_of
from zaya_train.tools.doctor_ranks import on_ranks
from zaya_train.tools.plan_time import Clock, phase_days
from zaya_train.train.built import build_phase
from zaya_train.train.staging import local_shard

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.config.schema import TrainConfig

GOLDEN = json.loads(rehearsal_table.GOLDEN.read_text())
PUBLISHED = compose(["recipe=zaya1_8b"])


def published(name: str = "sft", ranks: int = 1024, *overrides: str) -> Case:
    return Case(compose(["recipe=zaya1_8b", *overrides]) if overrides else PUBLISHED, name, ranks)


@pytest.mark.parametrize("launch", ["zaya1_8b", "zaya1_8b, full", "smoke_cpu"])
def test_bytes_and_calls_are_the_counted_ones(launch: str) -> None:
    """Of every collective in the recorded rehearsals, Muon's aside."""
    overrides, ranks = rehearsal_table.LAUNCHES[launch]
    for name, row in GOLDEN[launch].items():
        case = Case(compose(overrides), name, ranks)
        found: Counter[str] = Counter()
        for flow in case.traffic().flows():
            # Axes that are the same ranks have one name there.
            same = getattr(case.layout, flow.axis) == case.layout.world
            axis = "world" if same else flow.axis
            found[f"{flow.kind} {axis} calls"] += flow.calls
            found[f"{flow.kind} {axis} bytes"] += flow.bytes
        counted: Counter[str] = Counter()
        for key, flow in row["flows"].items():
            kind, _, axes = key.partition(" over ")
            axis = axes.split(" = ")[0]
            if kind == "all_to_all" and axis == "replicate":
                continue
            counted[f"{kind} {axis} calls"] += flow["calls"]
            counted[f"{kind} {axis} bytes"] += flow["bytes"]
        if launch == "smoke_cpu":
            # Muon's exchange goes over the same ranks as keys and values.
            for word in ("calls", "bytes"):
                counted.pop(f"all_to_all world {word}")
                found.pop(f"all_to_all world {word}", None)
        # The golden figures were recorded before attention's pairs: 8 bytes of 856.
        assert dict(found) == pytest.approx(dict(counted), rel=0.01), name


def test_muon_sends_what_was_counted() -> None:
    counted = GOLDEN["zaya1_8b"]["sft"]["flows"]["all_to_all over replicate"]
    (flow,) = [flow for flow in muon_flows(published()) if flow.axis == "replicate"]
    # The rehearsal counts rank 0 with its own part.
    assert flow.bytes == pytest.approx(counted["bytes"] * 127 / 128, rel=0.01)
    assert flow.calls == counted["calls"]
    golden = json.loads((rehearsal_table.GOLDEN.parent / "muon_owners.json").read_text())[2]
    assert muon_work(PUBLISHED.model, (128, 8, 1)).flops == golden["slowest_rank_flops"]


def test_what_stays_of_muons_matrices_is_taken_off_once() -> None:
    case = published("pretrain_1")
    machine = with_links(machine_of("MI300X", case.config.precision), 10.0, 5.0)
    machine = replace(
        machine,
        inside=replace(machine.inside, hop_seconds=0.0),
        between=replace(machine.between, hop_seconds=0.0),
    )
    rates = {"fsdp": 10e9, "replicate": 5e9}
    sent = sum(flow.bytes / rates[flow.axis] for flow in muon_flows(case))
    terms = {term.name: term.seconds for term in step_time(case, machine, 4096).terms}
    assert terms["Muon, updates sent"] == pytest.approx(sent)


def test_groups_lie_in_nodes_as_ranks_are_numbered() -> None:
    degrees = Layout(replicate=16, shard=4, context=2, expert=4)
    sizes = {
        axis: group_of(axis, degrees, 8) for axis in ("replicate", "context", "fsdp", "expert")
    }
    assert {axis: (g.ranks, g.in_node) for axis, g in sizes.items()} == {
        "replicate": (16, 1), "context": (2, 2), "fsdp": (8, 8), "expert": (4, 4),
    }  # fmt: skip
    assert group_of("world", degrees, 8).in_node == 8
    assert group_of("replicate", Layout(replicate=4, shard=2, context=1), 8).in_node == 4


def test_seconds_of_a_collective_by_hand() -> None:
    machine = machine_of("MI300X", PUBLISHED.precision)
    machine = replace(machine, inside=Link(100e9, 1e-5, ""), between=Link(10e9, 3e-5, ""))
    one_node, degrees = Layout(1, 8, 1), Layout(replicate=4, shard=8, context=1)
    gather = Flow("", "all_gather", "fsdp", 10**9, 5)
    # 8 GB whole, 7/8 carried at 100 GB/s; three hops of 10 us, five times.
    assert seconds_of(gather, one_node, machine) == pytest.approx(0.07 + 5 * 3 * 1e-5)
    reduce = Flow("", "all_reduce", "replicate", 10**9, 1)
    assert seconds_of(reduce, degrees, machine) == pytest.approx(0.15 + 2 * 3e-5)
    spread = Flow("", "all_to_all", "world", 32 * 10**9, 1)
    assert seconds_of(spread, degrees, machine) == pytest.approx(3.1 + 5 * 3e-5)
    ring = Flow("", "reduce_scatter", "world", 32 * 10**9, 1)
    # Eight adapters of a node together are 80 GB/s.
    assert seconds_of(ring, degrees, machine) == pytest.approx(31 / 80 + 5 * 3e-5)


def test_products_are_the_counted_operations() -> None:
    case = published("pretrain_1")
    machine = machine_of("MI300X", case.config.precision)
    time = step_time(case, machine, 4096)
    terms = {term.name: term.seconds for term in time.terms}
    forward = work_of(case, 4096)
    assert terms["products"] * machine.products.value == pytest.approx(
        4 * 3 * (forward.total - forward.attention)
    )
    # A token of a 4K document takes 2,915 MFLOP forward (docs/throughput.md).
    assert forward.total / case.tokens / 1e6 == pytest.approx(2915, abs=1)
    assert "products again" not in terms
    full = step_time(published("pretrain_1", 1024, "parallel.recompute=full"), machine, 4096)
    again = {term.name: term.seconds for term in full.terms}["products again"]
    assert again == pytest.approx(
        terms["products"] / 3 * (1 - forward.head / (forward.total - forward.attention))
    )


def test_reductions_are_waited_for_only_beyond_the_computing() -> None:
    case = published("pretrain_1")
    slow = with_links(machine_of("MI300X", case.config.precision), between_gb=1.0)
    fast = with_links(slow, between_gb=1e6)
    waited = [
        {t.name: t.seconds for t in step_time(case, machine, 4096).terms}[
            "gradients between replicas"
        ]
        for machine in (slow, fast)
    ]
    carried = 4424212512 * 2 * 127 / 128 / 1e9
    assert waited[0] == pytest.approx(carried, rel=0.02)
    assert waited[1] < 0.001


def waited_for(name: str, *overrides: str, **links: float) -> float:
    """Seconds of the term `name` of pretrain_1 on 1,024 devices."""
    case = published("pretrain_1", 1024, *overrides)
    machine = with_links(machine_of("MI300X", case.config.precision), **links)
    return sum(t.seconds for t in step_time(case, machine, 4096).terms if t.name == name)


def test_reductions_are_hidden_where_they_run() -> None:
    """Between replicas: once at the end, or after every micro-batch."""
    kept, last, each = (
        waited_for("gradients between replicas", f"parallel.accumulation={mode}", between_gb=5.0)
        for mode in ("keep_unsharded", "all_reduce_last", "reduce_each")
    )
    # One all-reduce beside the last micro-batch's backward pass, whatever is scattered before it.
    assert kept == pytest.approx(last)
    # Four, beside four of them.
    assert each == pytest.approx(4 * last) and last > 1.0
    reduced = [
        waited_for("gradients reduced", f"parallel.accumulation={mode}", inside_gb=5.0)
        for mode in ("keep_unsharded", "all_reduce_last", "reduce_each")
    ]
    assert reduced[1] == pytest.approx(4 * reduced[0])
    assert reduced[2] == pytest.approx(reduced[1])


def test_gathers_are_hidden_where_they_run() -> None:
    """Beside the first forward pass, or beside all computing where weights are freed in between."""
    case = published("pretrain_1")
    machine = with_links(machine_of("MI300X", case.config.precision), inside_gb=5.0)
    computing = sum(
        t.seconds
        for t in step_time(case, machine, 4096).terms
        if t.name in ("products", "attention", "elementwise")
    )
    for words, room in (
        ((), computing / 3 / case.micro_batches),
        (("parallel.reshard_after_forward=true",), computing),
    ):
        own = published("pretrain_1", 1024, *words)
        flows = [f for f in own.traffic().flows() if f.kind == "all_gather" and "weights" in f.what]
        carried = sum(seconds_of(flow, own.layout, machine) for flow in flows)
        found = waited_for("weights gathered", *words, inside_gb=5.0)
        assert found == pytest.approx(carried - room), words


def test_what_is_made_again_takes_its_operations_and_its_memory() -> None:
    case = published("pretrain_1")
    forward = work_of(case, 4096)
    machine = machine_of("MI300X", case.config.precision)
    small = forward.depthwise_convolution + forward.grouped_convolution + forward.router
    layers = forward.total - forward.attention - forward.head
    moved = waited_for("elementwise")
    for kind, products, attention, times in (
        ("none", 0, 0, 6),
        ("selective", small, 0, 7),
        ("full", layers, forward.attention, 8),
    ):
        words = f"parallel.recompute={kind}"
        micro = case.micro_batches
        again = waited_for("products again", words) * machine.products.value / micro
        assert again == pytest.approx(products), kind
        scores = waited_for("attention again", words) * machine.attention.value / micro
        assert scores == pytest.approx(attention), kind
        assert waited_for("elementwise", words) == pytest.approx(moved / 6 * times), kind


def test_a_second_of_computing_hides_one_of_each_link() -> None:
    """Scattered and between replicas beside the same backward pass: over two links side by side,
    over one of them one after another."""
    case = published("pretrain_1", 1024, "parallel.shard=16")
    sheet = machine_of("MI300X", case.config.precision)
    free = with_links(sheet, between_gb=1e6)
    computing = sum(
        t.seconds
        for t in step_time(case, free, 4096).terms
        if t.name in ("products", "attention", "elementwise")
    )
    room = computing * 2 / 3 / case.micro_batches
    flows = [f for f in case.traffic().flows() if "gradients" in f.what]

    def waited(node_ranks: int, rate_gb: float) -> float:
        machine = replace(with_links(sheet, rate_gb, rate_gb), node_ranks=node_ranks)
        names = ("gradients reduced", "gradients between replicas")
        return sum(t.seconds for t in step_time(case, machine, 4096).terms if t.name in names)

    # Shard groups of 16 in nodes of 16: each link has the whole backward pass to itself.
    for node_ranks, hidden in ((16, 2), (8, 1)):
        machine = replace(with_links(sheet, 0.5, 0.5), node_ranks=node_ranks)
        carried = sum(seconds_of(flow, case.layout, machine) for flow in flows)
        assert waited(node_ranks, 0.5) == pytest.approx(carried - hidden * room, rel=1e-6)


def test_a_plans_seconds_are_those_of_its_steps() -> None:
    cases = [published(name) for name in ("midtrain", "sft")]
    machine = machine_of("H200", PUBLISHED.precision)
    days = [phase_days(Clock(machine).of(case)) for case in cases]
    assert plan_seconds(cases, machine) == pytest.approx(sum(days) * 86400, rel=1e-5)


def test_days_are_tokens_over_speed() -> None:
    clock = Clock(machine_of("MI300X", PUBLISHED.precision))
    time = clock.of(published("sft"))
    assert phase_days(time) == pytest.approx(660e9 / time.tokens_per_second / 86400, rel=1e-5)
    shorter = Clock(clock.source, 1000).of(published("sft"))
    assert shorter.seconds < time.seconds


def test_newton_schulz_takes_the_rate_of_its_dtype() -> None:
    full, half = (
        waited_for("Muon", f"optim.muon.newton_schulz_dtype={dtype}") for dtype in ("fp32", "bf16")
    )
    assert full == pytest.approx(half * 1307.4 / 163.4)


def state_bytes(config: TrainConfig, ranks: int) -> tuple[int, int]:
    """Of what a checkpoint of the phase `short` holds: whole, and on this rank."""
    phase = config.plan.phases["short"]
    mesh = Mesh.build(layout(phase, config.parallel, ranks), "cpu")
    tensors = build_phase(config, ("short", phase), mesh, torch.device("cpu")).tensors().values()
    local = sum(x.numel() * x.element_size() for x in map(local_shard, tensors))
    return sum(x.numel() * x.element_size() for x in tensors), local


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_is_as_large_as_the_state_there_is(dtype: str) -> None:
    config = tiny({"optim.muon.momentum_dtype": dtype})
    (whole, largest), *_ = on_ranks(state_bytes, 2, config, 2)
    assert checkpoint_bytes(config) == whole
    # Balancing and counters are a kilobyte besides.
    assert host_bytes(Case(config, "short", 2)) == pytest.approx(largest, abs=1024)


def test_plan_shows_time_or_says_why_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", "recipe=zaya1_8b", "--ranks", "1024", "--device", "MI300X"]) == 0
    shown = capsys.readouterr().out
    assert "forecast of a step on 1,024 x MI300X" in shown and "device-hours" in shown
    assert "free of 206" in shown
    assert main(["plan", "recipe=smoke_cpu"]) == 0
    assert "no forecast of time: name a --device" in capsys.readouterr().out
