"""How preflight judges: limits, outliers, links, and what AMD's tools say.

The samples of tool output are written by us after the tools' documentation and public examples;
none was recorded on a machine of ours.
"""

from __future__ import annotations

import json
import math
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.paths import REPOSITORY
from zaya_train.config.errors import ConfigError
from zaya_train.main import compose_submission
from zaya_train.planning.exchange import bus_factor
from zaya_train.tools import preflight_smi as smi
from zaya_train.tools.preflight_findings import (
    Finding,
    Measured,
    Place,
    failing_nodes,
    judge_minimum,
    odd_ones,
    slow_ones,
    slow_pairs,
)
from zaya_train.tools.preflight_limits import MI300X, Limits, limits_of
from zaya_train.tools.preflight_links import node_groups, pairings, rails
from zaya_train.tools.preflight_machine import (
    environment_that_matters,
    kernel_findings,
    nic_findings,
    versions,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

CLUSTERS = sorted(path.stem for path in (REPOSITORY / "configs" / "cluster").glob("*.yaml"))
PLACES = [Place(f"n{rank // 2}", rank, rank % 2) for rank in range(8)]


def statuses(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


def figures(values: list[float], device: str = "X") -> list[Measured]:
    places = zip(PLACES, values, strict=False)
    return [Measured("memory", place, value, "GB/s", device) for place, value in places]


@pytest.mark.parametrize(
    ("value", "least", "status"),
    [(5.0, None, "SKIP"), (5.0, 5.0, "PASS"), (4.99, 5.0, "FAIL"), (math.nan, 5.0, "FAIL")],
)
def test_a_figure_is_judged_by_its_limit(value: float, least: float | None, status: str) -> None:
    finding = judge_minimum(figures([value])[0], least)
    assert (finding.status, finding.node, finding.rank) == (status, "n0", 0)


def test_the_slow_rank_is_named_and_kinds_are_not_mixed() -> None:
    assert not slow_ones(figures([100.0, 90.0, 95.0, 86.0]))
    (slow,) = slow_ones(figures([100.0, 99.0, 101.0, 70.0]))
    assert (slow.node, slow.rank, slow.status) == ("n1", 3, "FAIL")
    assert "85%" in slow.rule and "4 ranks" in slow.rule
    # Too few to tell which is normal, and another kind of device is no measure.
    assert not slow_ones(figures([100.0, 10.0, 100.0]))
    assert not slow_ones(figures([100.0] * 4) + figures([10.0] * 3, "Y"))
    assert len(slow_ones(figures([100.0, 100.0, 100.0, math.nan]))) == 1


def test_the_one_that_differs_is_named() -> None:
    facts = {place: {"driver": "6.12", "torch": "2.13"} for place in PLACES[:4]}
    assert statuses(odd_ones("version", facts)) == {"version": "PASS"}
    facts[PLACES[2]] = {"driver": "6.10", "torch": "2.13"}
    failed = [f for f in odd_ones("version", facts) if f.status == "FAIL"]
    assert [(f.node, f.rank, f.value) for f in failed] == [("n1", 2, "driver = 6.10")]
    del facts[PLACES[2]]
    facts[PLACES[3]] = {"torch": "2.13"}
    failed = [f for f in odd_ones("version", facts) if f.status == "FAIL"]
    assert [(f.rank, f.value) for f in failed] == [(3, "driver = absent")]


def test_a_slow_node_is_told_from_its_partners() -> None:
    def ring(*rates: float) -> dict[tuple[str, str], float]:
        return {(f"n{i}", f"n{(i + 1) % len(rates)}"): rate for i, rate in enumerate(rates)}

    assert not failing_nodes(slow_pairs(ring(50, 48, 49, 47, 50, 49), 35.0))
    # n3's pairs are those with n2 and n4.
    assert failing_nodes(slow_pairs(ring(50, 50, 20, 20, 50, 50), 35.0)) == ["n3"]
    assert failing_nodes(slow_pairs(ring(50, 50, 20, 20, 50, 50), None)) == ["n3"]
    # A single slow pair has a good partner on either side.
    assert not failing_nodes(slow_pairs(ring(50, 50, 20, 50, 50, 50), 35.0))
    assert failing_nodes(slow_pairs({("a", "b"): 20.0}, 35.0)) == ["a", "b"]
    assert statuses(slow_pairs({("a", "b"): 20.0}, None)) == {"link": "SKIP"}
    assert not slow_pairs({}, 35.0)


@pytest.mark.parametrize("nodes", range(12))
def test_pairings_meet_every_neighbour_and_nobody_twice_at_once(nodes: int) -> None:
    rounds = pairings(nodes)
    for round_ in rounds:
        busy = [node for pair in round_ for node in pair]
        assert len(busy) == len(set(busy))
    met = {frozenset(pair) for round_ in rounds for pair in round_}
    assert met == {frozenset((i, (i + 1) % nodes)) for i in range(nodes) if nodes > 1}


def test_groups_by_node_and_across() -> None:
    assert node_groups(PLACES) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rails(node_groups(PLACES)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert bus_factor("all_reduce", 8) == 2 * 7 / 8 and bus_factor("all_gather", 8) == 7 / 8


def test_limits_are_the_devices_own_or_none() -> None:
    assert limits_of("AMD Instinct MI300X VF") == MI300X
    assert limits_of("AMD EPYC") == Limits()
    assert limits_of("AMD EPYC", ["gemm_tflops=2"]).gemm_tflops == 2.0
    for word, said in (("gemm=2", "no limit of that name"), ("gemm_tflops=x", "not a number")):
        with pytest.raises(ConfigError, match=said):
            limits_of("AMD EPYC", [word])


def gpu(index: int, **changes: Any) -> dict[str, Any]:
    """A device as `amd-smi metric --json` shows one in good health."""
    return {
        "gpu": index,
        "usage": {"gfx_activity": {"value": 0, "unit": "%"}},
        "power": {"socket_power": {"value": 141, "unit": "W"}, "throttle_status": "N/A"},
        "clock": {"gfx_0": {"clk": {"value": 132, "unit": "MHz"}, "clk_locked": "DISABLED"}},
        "temperature": {
            "edge": "N/A",
            "hotspot": {"value": 41, "unit": "C"},
            "mem": {"value": 35, "unit": "C"},
        },
        "ecc": {"total_correctable_count": 3, "total_uncorrectable_count": 0},
        "throttle": {"socket_thermal_violation_status": "NOT ACTIVE"},
        **changes,
    }


def health(*devices: dict[str, Any], wrap: bool = True) -> dict[str, str]:
    text = json.dumps({"gpu_data": list(devices)} if wrap else list(devices))
    return statuses(smi.health_findings("n0", smi.parse_metric(text)))


def test_amd_smi_metric_in_both_formats() -> None:
    healthy = dict.fromkeys(("temperature", "memory errors", "throttling", "clocks"), "PASS")
    assert health(gpu(0), gpu(1)) == healthy
    assert health(gpu(0), gpu(1), wrap=False) == healthy


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("temperature", {"temperature": {"hotspot": {"value": 104, "unit": "C"}}}),
        ("memory errors", {"ecc": {"total_uncorrectable_count": 1}}),
        ("throttling", {"throttle": {"ppt_violation_status": "ACTIVE"}}),
        ("throttling", {"power": {"throttle_status": "THROTTLED"}}),
        ("clocks", {"clock": {"gfx_3": {"clk_locked": "ENABLED"}}}),
    ],
)
def test_a_sick_device_fails_its_check(check: str, change: dict[str, Any]) -> None:
    found = health(gpu(0), gpu(1, **change))
    assert [name for name, status in found.items() if status == "FAIL"] == [check]


def test_what_the_tool_does_not_know_is_skipped() -> None:
    found = health(gpu(0, temperature={"edge": "N/A"}, ecc={"total_uncorrectable_count": "N/A"}))
    assert found["temperature"] == found["memory errors"] == "SKIP"
    for text in ("", "[]x", '{"a": 1}', '[{"b": 1}]'):
        with pytest.raises(smi.SmiError):
            smi.parse_metric(text)
        with pytest.raises(smi.SmiError):
            smi.parse_rocm_topology(text)


def mesh(devices: int, kind: str = "XGMI") -> list[dict[str, Any]]:
    return [
        {
            "gpu": a,
            "links": [
                {
                    "gpu": b,
                    "link_status": "ENABLED",
                    "link_type": "SELF" if a == b else kind,
                    "num_hops": int(a != b),
                }
                for b in range(devices)
            ],
        }
        for a in range(devices)
    ]


def test_every_pair_must_be_linked() -> None:
    rows = mesh(8)
    links = smi.parse_topology(json.dumps(rows))
    assert smi.link_finding("n0", 8, links).status == "PASS"
    rows[3]["links"][5]["link_type"] = "PCIE"
    finding = smi.link_finding("n0", 8, smi.parse_topology(json.dumps(rows)))
    assert finding.status == "FAIL" and "3-5 PCIE" in finding.value
    rows = mesh(8)
    rows[0]["links"][1]["link_status"] = "DISABLED"
    finding = smi.link_finding("n0", 8, smi.parse_topology(json.dumps(rows)))
    assert finding.status == "FAIL" and "0-1 absent" in finding.value
    old = {
        "system": {
            f"(Topology) Link type between DRM devices {a} and {b}": "XGMI"
            for a in range(4)
            for b in range(a + 1, 4)
        }
    }
    assert smi.link_finding("n0", 4, smi.parse_rocm_topology(json.dumps(old))).status == "PASS"


def tool(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_tools_are_run_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {f.status for f in smi.node_findings("n0", 2)} == {"SKIP"}
    tool(tmp_path / "rocm-smi", "echo '" + json.dumps({"system": {}}) + "'")
    assert statuses(smi.node_findings("n0", 2)) == {"device health": "SKIP", "xGMI links": "FAIL"}
    metric, topology = json.dumps({"gpu_data": [gpu(0), gpu(1)]}), json.dumps(mesh(2))
    body = f"case $1 in metric) echo '{metric}' ;; *) echo '{topology}' ;; esac"
    tool(tmp_path / "amd-smi", body)
    found = statuses(smi.node_findings("n0", 2))
    assert set(found.values()) == {"PASS"} and "xGMI links" in found
    tool(tmp_path / "amd-smi", "echo 'no driver' >&2; exit 3")
    (failed,) = smi.node_findings("n0", 2)
    assert failed.status == "FAIL" and "exit code 3: no driver" in failed.value


def port(
    root: Path, name: str, state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)"
) -> None:
    folder = root / "sys/class/infiniband" / name / "ports/1"
    folder.mkdir(parents=True)
    (folder / "state").write_text(state + "\n")
    (folder / "rate").write_text(rate + "\n")


def test_network_adapters_are_counted_and_must_be_up(tmp_path: Path) -> None:
    assert statuses(nic_findings("n0", Limits(), tmp_path)) == {"network adapters": "SKIP"}
    assert statuses(nic_findings("n0", MI300X, tmp_path)) == {"network adapters": "FAIL"}
    for number in range(8):
        port(tmp_path, f"ionic_{number}")
    port(tmp_path, "mlx5_0", "1: DOWN", "100 Gb/sec (4X EDR)")  # the storage network's
    assert set(statuses(nic_findings("n0", MI300X, tmp_path)).values()) == {"PASS"}
    (tmp_path / "sys/class/infiniband/ionic_3/ports/1/state").write_text("1: DOWN\n")
    failed = [f for f in nic_findings("n0", MI300X, tmp_path) if f.status == "FAIL"]
    assert [f.value for f in failed] == ["ionic_3/1: 1: DOWN, 400 Gb/sec (4X NDR)"]
    # A port that came up at a lower rate is one too few.
    (tmp_path / "sys/class/infiniband/ionic_3/ports/1/rate").write_text("100 Gb/sec (4X EDR)\n")
    failed = [f for f in nic_findings("n0", MI300X, tmp_path) if f.status == "FAIL"]
    assert [f.value for f in failed] == ["7 of 9 RDMA ports"]


def test_kernel_settings(tmp_path: Path) -> None:
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "dev/shm").mkdir(parents=True)
    setting = tmp_path / "proc/sys/kernel/numa_balancing"
    for text, status in (("0", "PASS"), ("1", "FAIL")):
        setting.write_text(text)
        assert statuses(kernel_findings("n0", True, tmp_path))["NUMA balancing"] == status
        assert statuses(kernel_findings("n0", False, tmp_path))["NUMA balancing"] == "SKIP"


def test_facts_that_must_agree(tmp_path: Path) -> None:
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    (tmp_path / "sys/module/amdgpu/version").write_text("6.14.5\n")
    assert versions(tmp_path)["driver"] == "6.14.5" and "driver" not in versions(tmp_path / "none")
    environment = {"NCCL_IB_TC": "104", "HOME": "x", "HIP_VISIBLE_DEVICES": "1"}
    assert environment_that_matters(environment) == {"NCCL_IB_TC": "104"}
    assert os.environ.keys() >= environment_that_matters(os.environ).keys()


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_variable_of_a_table_must_agree(cluster: str) -> None:
    table = compose_submission([f"cluster={cluster}", "nodes=1"])[0].environment
    values = {name: variable.value for name, variable in table.items()}
    assert environment_that_matters(values) == values
