"""What AMD's own tools say about a node: `amd-smi` where it is, `rocm-smi` else.

The formats are those of the tools' documentation and of public examples of their output (ROCm 6
gives a list, ROCm 7 an object with `gpu_data`); no machine of this project has an AMD GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import ZayaError, first_line
from zaya_train.tools.preflight_findings import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

HOTTEST_CELSIUS = 100.0
"""Idle or lightly loaded: MI300X slows itself down near 105 (junction), seen as a violation."""
_SECONDS = 60.0
_PAIR = re.compile(r"\(Topology\) Link type between DRM devices (\d+) and (\d+)")


class SmiError(ZayaError):
    """A tool of AMD's failed or said something that is not understood."""


@dataclass(frozen=True)
class Health:
    """One GPU; None is unknown."""

    index: int
    hottest_celsius: float | None = None
    uncorrectable_errors: int | None = None
    violations: tuple[str, ...] = ()
    """Reasons for which the device slows itself down at the moment."""
    locked_clocks: tuple[str, ...] = field(default=())


def node_findings(node: str, devices: int) -> list[Finding]:
    """Temperatures, errors, throttling and links of all devices of this node."""
    try:
        return list(_amd(node, devices))
    except SmiError as error:
        return [Finding("amd-smi", node, "FAIL", str(error), "answers in a known format")]


def _amd(node: str, devices: int) -> Iterator[Finding]:
    if shutil.which("amd-smi"):
        yield from health_findings(node, parse_metric(_run("amd-smi", "metric", "--json")))
        links = parse_topology(_run("amd-smi", "topology", "--json"))
    elif shutil.which("rocm-smi"):
        why = "no amd-smi here; rocm-smi tells links only"
        yield Finding("device health", node, "SKIP", "", why)
        links = parse_rocm_topology(_run("rocm-smi", "--showtopotype", "--json"))
    else:
        yield Finding("device health", node, "SKIP", "", "neither amd-smi nor rocm-smi here")
        yield Finding("xGMI links", node, "SKIP", "", "neither amd-smi nor rocm-smi here")
        return
    yield link_finding(node, devices, links)


def _run(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SmiError(f"{' '.join(words)}: {first_line(error)}") from error
    if done.returncode:
        raise SmiError(
            f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()[:200]}"
        )
    return done.stdout


def parse_metric(text: str) -> list[Health]:
    """`amd-smi metric --json`. SmiError when it is not that."""
    return [_health(row) for row in _rows(text, "amd-smi metric")]


def _rows(text: str, tool: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise SmiError(f"{tool}: not JSON: {error}") from error
    rows = content.get("gpu_data") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "gpu" in r for r in rows):
        raise SmiError(f"{tool}: neither a list of GPUs nor an object with gpu_data")
    return rows


def _health(row: dict[str, Any]) -> Health:
    temperatures = [_number(value) for value in (row.get("temperature") or {}).values()]
    known = [value for value in temperatures if value is not None]
    errors = _number((row.get("ecc") or {}).get("total_uncorrectable_count"))
    flags = dict(_leaves(row))
    violations = [
        name for name, value in flags.items()
        if (name.endswith("violation_status") and value == "ACTIVE")
        or (name.endswith("throttle_status") and value == "THROTTLED")
    ]  # fmt: skip
    locked = [name for name, value in flags.items() if name.endswith("clk_locked")]
    return Health(
        index=int(row["gpu"]),
        hottest_celsius=max(known, default=None),
        uncorrectable_errors=None if errors is None else int(errors),
        violations=tuple(violations),
        locked_clocks=tuple(name for name in locked if flags[name] == "ENABLED"),
    )


def _number(value: Any) -> float | None:
    """The figure in `{"value": 41, "unit": "C"}`, a number or a text of one; None for N/A."""
    if isinstance(value, dict):
        value = value.get("value")
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else ()
    for key, item in items:
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(item, dict):
            yield from _leaves(item, name)
        else:
            yield name, item


def health_findings(node: str, devices: list[Health]) -> Iterator[Finding]:
    """One finding per rule and device that breaks it, one PASS per rule that none breaks."""
    rules = (
        (
            "temperature",
            f"below {HOTTEST_CELSIUS:g} C",
            lambda h: h.hottest_celsius,
            lambda v: v < HOTTEST_CELSIUS,
        ),
        (
            "memory errors",
            "no uncorrectable error since the driver was loaded",
            lambda h: h.uncorrectable_errors,
            lambda v: v == 0,
        ),
        ("throttling", "no active violation", lambda h: h.violations, lambda v: not v),
        ("clocks", "not locked", lambda h: h.locked_clocks, lambda v: not v),
    )
    for check, rule, value_of, holds in rules:
        values = {device.index: value_of(device) for device in devices}
        known = {index: value for index, value in values.items() if value is not None}
        if not known:
            yield Finding(check, node, "SKIP", "", "amd-smi gives no value")
            continue
        bad = {index: value for index, value in known.items() if not holds(value)}
        for index, value in bad.items():
            yield Finding(check, node, "FAIL", f"GPU {index}: {value}", rule)
        if not bad:
            yield Finding(check, node, "PASS", f"{len(known)} GPUs", rule)


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """Link type by ordered pair of GPUs from `amd-smi topology --json`, enabled links only."""
    found = {}
    for row in _rows(text, "amd-smi topology"):
        for link in row.get("links") or []:
            if link.get("link_status", "ENABLED") == "ENABLED":
                found[(int(row["gpu"]), int(link["gpu"]))] = str(link.get("link_type"))
    return found


def parse_rocm_topology(text: str) -> dict[tuple[int, int], str]:
    """The same from `rocm-smi --showtopotype --json`, which names each pair once."""
    try:
        rows = json.loads(text)["system"]
    except (ValueError, KeyError, TypeError) as error:
        raise SmiError("rocm-smi --showtopotype: not an object with `system`") from error
    found = {}
    for name, kind in rows.items():
        if pair := _PAIR.fullmatch(name):
            one, other = int(pair[1]), int(pair[2])
            found[(one, other)] = found[(other, one)] = str(kind)
    return found


def link_finding(node: str, devices: int, links: dict[tuple[int, int], str]) -> Finding:
    """Every GPU must reach every other over xGMI: RCCL falls back to PCIe without a word."""
    pairs = [(a, b) for a in range(devices) for b in range(devices) if a != b]
    bad = [(a, b) for a, b in pairs if links.get((a, b)) != "XGMI"]
    rule = f"xGMI between all {devices} GPUs"
    if bad:
        shown = ", ".join(f"{a}-{b} {links.get((a, b), 'absent')}" for a, b in bad[:4])
        return Finding("xGMI links", node, "FAIL", f"{len(bad)} of {len(pairs)}: {shown}", rule)
    return Finding("xGMI links", node, "PASS", f"{len(pairs)} directed pairs", rule)
