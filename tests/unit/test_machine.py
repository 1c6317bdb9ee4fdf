"""What a cluster can do: data sheets, preflight files in their place, links by how nodes lie."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from zaya_train.config.derive import Layout
from zaya_train.config.errors import ConfigError
from zaya_train.main import compose
from zaya_train.parallel.traffic import Flow
from zaya_train.planning.exchange import group_of, seconds_of
from zaya_train.planning.machine import Link, machine_of, with_links, with_preflight

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.planning.machine import Machine

PUBLISHED = compose(["recipe=zaya1_8b"])


def test_a_preflight_file_takes_the_place_of_data_sheets(tmp_path: Path) -> None:
    curves = []
    for kib in (1024, 65536):
        size = kib * 1024
        seconds = 3 * 5e-5 + size * 2 * 7 / 8 / 200e9
        rate = size * 2 * 7 / 8 / seconds / 1e9
        curves.append(
            {
                "scope": "node",
                "collective": "all_reduce",
                "message_kib": kib,
                "ranks": 8,
                "gb_per_second": rate,
            }
        )
    measured = [
        {"check": "matrix product", "value": 600.0},
        {"check": "memory", "value": 4000.0},
        {"check": "memory", "value": 4300.0},
        {"check": "memory", "value": 4100.0},
    ]
    path = tmp_path / "preflight.json"
    report = {"curves": curves, "measured": measured, "device": "AMD Instinct MI300X"}
    path.write_text(json.dumps(report))
    machine = with_preflight(machine_of("MI300X", PUBLISHED.precision), path)
    assert machine.copies.value == 4100e9 and "measured" in machine.copies.source
    assert machine.lacks == ("no usable all_reduce curve: between nodes",)
    assert machine.attention.value == pytest.approx(320e12)
    assert "x 0.67 assumed for attention" in machine.attention.source
    assert machine.inside.bytes_per_second == pytest.approx(200e9)
    assert machine.inside.hop_seconds == pytest.approx(5e-5)
    assert machine.products.value == pytest.approx(480e12) and "measured" in machine.products.source
    assert machine.between.source == "data sheet"
    # A bf16 product says nothing of a run in fp32, but of its Muon.
    sheet = machine_of("MI300X", replace(PUBLISHED.precision, compute_dtype="fp32"))
    single = with_preflight(sheet, path)
    assert single.products == sheet.products and single.attention == sheet.attention
    assert single.by_dtype["bf16"].value == pytest.approx(480e12)
    assert "the run's are of fp32" in single.lacks[-1]
    with pytest.raises(ConfigError, match="of AMD Instinct MI300X, not of --device H200"):
        with_preflight(machine_of("H200", PUBLISHED.precision), path)
    path.write_text(json.dumps({**report, "measured": [], "curves": []}))
    assert len(with_preflight(sheet, path).lacks) == 5
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no report of zaya preflight"):
        with_preflight(machine, path)


def test_memory_is_what_torch_reports() -> None:
    assert machine_of("MI300X", PUBLISHED.precision).memory_gb == pytest.approx(
        192 * 2**30 / 1e9, rel=0.01
    )
    assert machine_of("H200", PUBLISHED.precision).memory_gb == pytest.approx(
        139 * 2**30 / 1e9, rel=0.01
    )
    h100 = machine_of("H100", PUBLISHED.precision)
    assert h100.device == "H100 80GB HBM3" and 80 < h100.memory_gb < 85.9


def test_an_unknown_device_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--device MI300: .*MI300X"):
        machine_of("MI300", PUBLISHED.precision)


def test_a_part_of_a_node_has_a_part_of_its_pairwise_links() -> None:
    pairwise = machine_of("MI300X", PUBLISHED.precision)
    switched = machine_of("H200", PUBLISHED.precision)
    moved = 10**9
    for ranks, share in ((2, 1 / 7), (4, 3 / 7), (8, 1.0)):
        spread = Flow("", "all_to_all", "context", moved, 0)
        degrees = Layout(replicate=1, shard=8, context=ranks)
        carried = moved * (ranks - 1) / ranks
        assert seconds_of(spread, degrees, pairwise) == pytest.approx(carried / (336e9 * share))
        assert seconds_of(spread, degrees, switched) == pytest.approx(carried / 360e9)
    # Two ranks of each node: a ring through two adapters and one link inside.
    ring = Flow("", "reduce_scatter", "replicate", moved, 0)
    degrees = Layout(replicate=4, shard=4, context=1)
    assert seconds_of(ring, degrees, pairwise) == pytest.approx(moved * 3 / 4 / 48e9)
    # One of each: its own adapter, and nothing inside.
    degrees = Layout(replicate=4, shard=8, context=1)
    assert seconds_of(ring, degrees, pairwise) == pytest.approx(moved * 3 / 4 / 50e9)


def curve(scope: str, ranks: int, kib: int, seconds: float, kind: str = "all_reduce") -> Any:
    """A point as preflight writes it: bus bandwidth."""
    rate = kib * 1024 * 2 * (ranks - 1) / ranks / seconds / 1e9
    return {
        "scope": scope,
        "collective": kind,
        "message_kib": kib,
        "ranks": ranks,
        "gb_per_second": rate,
    }


def measured(path: Path, curves: list[Any], device: str = "AMD Instinct MI300X") -> Machine:
    """The machine of a file with these curves."""
    path.write_text(json.dumps({"curves": curves, "measured": [], "device": device}))
    name = "MI300X" if "AMD" in device else "H200"
    return with_preflight(machine_of(name, PUBLISHED.precision), path)


def test_lines_through_curves_are_links(tmp_path: Path) -> None:
    path = tmp_path / "preflight.json"
    node = [curve("node", 4, 1024, 1e-3), curve("node", 4, 2048, 1.5e-3)]
    across = [
        curve("between nodes", 16, 1024, 3e-3),
        curve("between nodes", 16, 2048, 4e-3),
        # The median of the repetitions counts.
        curve("between nodes", 16, 2048, 4e-3),
        curve("between nodes", 16, 2048, 9e-3),
    ]
    other = [curve("node", 4, 4096, 9.0, "all_gather"), curve("rack", 4, 4096, 9.0)]
    machine = measured(path, [*node, *across, *other])
    moved = 1024 * 1024
    assert machine.inside.bytes_per_second == pytest.approx(moved * 2 * 3 / 4 / 0.5e-3)
    assert machine.inside.hop_seconds == pytest.approx(0.5e-3 / 2)
    assert machine.between.bytes_per_second == pytest.approx(moved * 2 * 15 / 16 / 1e-3)
    assert machine.between.hop_seconds == pytest.approx(2e-3 / 4)
    assert "preflight.json" in machine.between.source
    # Four devices use three links of each.
    assert machine.inside.peers == 3
    assert measured(path, node, "NVIDIA H200").inside.peers is None
    assert len(machine.lacks) == 2 and not any("curve" in line for line in machine.lacks)


def test_curves_that_make_no_line_are_not_taken(tmp_path: Path) -> None:
    sheet = machine_of("MI300X", PUBLISHED.precision)
    for curves in (
        [curve("node", 8, 1024, 1e-3)],
        # Larger messages cannot take less time.
        [curve("node", 8, 1024, 2e-3), curve("node", 8, 2048, 1e-3)],
    ):
        machine = measured(tmp_path / "preflight.json", curves)
        assert machine.inside == sheet.inside
        assert "no usable all_reduce curve: node" in machine.lacks
    # A line that begins below nothing has no latency.
    steep = [curve("node", 8, 1024, 1e-3), curve("node", 8, 2048, 9e-3)]
    assert measured(tmp_path / "preflight.json", steep).inside.hop_seconds == 0.0


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"curves": [], "device": "x"}', "3"])
def test_a_file_that_is_no_report_is_named(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "preflight.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"--preflight .*preflight.json: no report of"):
        with_preflight(machine_of("MI300X", PUBLISHED.precision), path)


def test_a_file_of_no_known_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of AMD EPYC, not of --device MI300X"):
        measured(tmp_path / "preflight.json", [], "AMD EPYC")


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_links_of_the_users_own_are_positive(rate: float) -> None:
    sheet = machine_of("MI300X", PUBLISHED.precision)
    with pytest.raises(ConfigError, match="--inside-gb-per-second"):
        with_links(sheet, inside_gb=rate)
    with pytest.raises(ConfigError, match="--between-gb-per-second"):
        with_links(sheet, between_gb=rate)


def test_more_ranks_than_were_measured_have_no_more_links() -> None:
    sheet = machine_of("MI300X", PUBLISHED.precision)
    machine = replace(sheet, inside=Link(100e9, 0.0, "", 3))
    spread = Flow("", "all_to_all", "context", 10**9, 0)
    degrees = Layout(replicate=1, shard=8, context=8)
    assert seconds_of(spread, degrees, machine) == pytest.approx(10**9 * 7 / 8 / 100e9)


def test_ranks_that_hold_parts_of_the_same_experts_lie_apart() -> None:
    """Every fourth rank of a node has the same experts: two of them on it."""
    degrees = Layout(replicate=1, shard=16, context=1, expert=4)
    assert group_of("expert_shard", degrees, 8).in_node == 2
    assert group_of("expert", degrees, 8).in_node == 4
