"""What a cluster can do: rates of its devices and links, each with where the figure comes from."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import ConfigError
from zaya_train.config.suggest import unknown_name
from zaya_train.planning.exchange import bus_factor, hops
from zaya_train.runtime.peaks import TABLE, row_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zaya_train.config.precision import PrecisionConfig
    from zaya_train.runtime.peaks import DeviceRow, Dtype

GIGA = 1e9
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16")
PRODUCT_SHARE, ATTENTION_SHARE = 0.45, 0.30
"""Of the data sheet's peak that a step's products and attention reach: assumed, for large runs
state an MFU of 0.35 to 0.45."""
MEASURED_SHARE = 0.80
"""Of a large plain product's measured rate, for the shapes of a step: assumed."""
COPY_SHARE = 0.80
"""Of the data sheet's memory bandwidth: assumed; Zyphra measured 4.3 of 5.3 TB/s (2511.17127)."""


@dataclass(frozen=True)
class Rate:
    """Of something per second, and who says so."""

    value: float
    source: str


@dataclass(frozen=True)
class Link:
    """Bus bandwidth of one rank and the latency of one hop."""

    bytes_per_second: float
    hop_seconds: float
    source: str
    peers: int | None = None
    """Devices it takes to reach that, each on a link of its own; None behind a switch."""


@dataclass(frozen=True)
class DeviceLinks:
    """What a data sheet says besides products; bytes are 10^9."""

    memory_gb: float
    """That torch reports, less than the sheet's where the driver keeps some."""
    memory_gb_per_second: float
    inside_gb_per_second: float
    """Of one device to all others of its node, one way."""
    between_gb_per_second: float = 50.0
    """One adapter of 400 Gbit/s per device."""
    peer_links: int | None = None
    """Links that make up `inside_gb_per_second`, one to each other device; None: a switch."""


LINKS = {
    # Memory: AMD's figures are GiB (MI300X: 192 GiB = 206 GB), as torch and rocm-smi report. Of
    # 80 and 141 GB by NVIDIA's sheets torch reports 79.1 GiB on an H100 (vllm issue 27508) and
    # about 139 GiB on an H200, of which nvidia-smi showed 143,771 MiB.
    # 7 xGMI links of 48 GB/s usable (AMD, ROCm blogs); a network adapter each (2511.17127).
    "MI300X": DeviceLinks(206, 5300, 336, peer_links=7),
    "MI325X": DeviceLinks(274, 6000, 336, peer_links=7),
    # 7 xGMI links of 76.8 GB/s, of which three quarters as measured on MI300X.
    "MI350X": DeviceLinks(309, 8000, 403, peer_links=7),
    "MI355X": DeviceLinks(309, 8000, 403, peer_links=7),
    # NVLink 4: 450 GB/s one way, four fifths of it.
    "H100 80GB HBM3": DeviceLinks(84.9, 3350, 360),
    "H100 PCIe": DeviceLinks(84.9, 2000, 50),
    "H200": DeviceLinks(149, 4800, 360),
    "A100": DeviceLinks(84.9, 2000, 240, 25.0),
}
ALIASES = {"H100": "H100 80GB HBM3"}
"""Short names of `--device`."""
HOP_SECONDS = {"inside": 10e-6, "between": 20e-6}
"""Assumed."""


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes."""

    device: str
    node_ranks: int
    memory_gb: float
    dtype: Dtype
    """The run's compute dtype."""
    products: Rate
    """FLOP/s of weight products, in the run's compute dtype."""
    by_dtype: Mapping[Dtype, Rate]
    """The same in fp32 and bf16."""
    attention: Rate
    """FLOP/s of scores and weighted values."""
    copies: Rate
    """Bytes per second of elementwise work."""
    inside: Link
    between: Link
    lacks: tuple[str, ...] = ()
    """What a preflight file was asked for and does not have: data sheets stand in."""


def machine_of(device: str, precision: PrecisionConfig, node_ranks: int = 8) -> Machine:
    """By data sheets. ConfigError names the known ones for another device."""
    device = ALIASES.get(device, device)
    links = LINKS.get(device)
    row = next((row for row in TABLE if row.name.strip("$") == device), None)
    if links is None or row is None:
        known = ", ".join(LINKS)
        raise ConfigError(
            f"--device {device}: no such device{unknown_name(device, LINKS)}; known: {known}"
        )
    by_dtype = {dtype: _of_sheet(row, dtype, PRODUCT_SHARE) for dtype in DTYPES}
    return Machine(
        device=device,
        node_ranks=node_ranks,
        memory_gb=links.memory_gb,
        dtype=precision.compute_dtype,
        products=by_dtype[precision.compute_dtype],
        by_dtype=by_dtype,
        attention=_of_sheet(row, precision.compute_dtype, ATTENTION_SHARE),
        copies=Rate(
            links.memory_gb_per_second * GIGA * COPY_SHARE,
            f"{links.memory_gb_per_second:,g} GB/s of the data sheet x {COPY_SHARE:g} assumed",
        ),
        inside=Link(
            links.inside_gb_per_second * GIGA,
            HOP_SECONDS["inside"],
            "data sheet",
            links.peer_links,
        ),
        between=Link(links.between_gb_per_second * GIGA, HOP_SECONDS["between"], "data sheet"),
    )


def _of_sheet(row: DeviceRow, dtype: Dtype, share: float) -> Rate:
    peak = row.peak(dtype)
    said = f"{peak / 1e12:,.1f} TFLOP/s of the {row.source} x {share:g} assumed"
    return Rate(peak * share, said)


def with_links(
    machine: Machine, inside_gb: float | None = None, between_gb: float | None = None
) -> Machine:
    """Links of the user's own, GB/s of one rank."""
    for name, rate in (("inside", inside_gb), ("between", between_gb)):
        if rate is not None and not rate > 0:
            raise ConfigError(f"--{name}-gb-per-second {rate:g}: must be positive")
    return replace(
        machine,
        inside=_given(machine.inside, inside_gb),
        between=_given(machine.between, between_gb),
    )


def _given(link: Link, rate_gb: float | None) -> Link:
    if rate_gb is None:
        return link
    return replace(link, bytes_per_second=rate_gb * GIGA, source="given")


def with_preflight(machine: Machine, path: Path) -> Machine:
    """Rates that `zaya preflight` measured in place of data sheets; `lacks` says what it did not.

    Products, in bf16 on a GPU, and copies: the median over ranks. Links: a line through the seconds
    of every size of message. ConfigError where the file cannot be read or is of another device.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        curves, device = report["curves"], str(report["device"])
        rates = {
            check: _median(report["measured"], check) for check in ("matrix product", "memory")
        }
        fits = {scope: _line(curves, scope) for scope in ("node", "between nodes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--preflight {path}: no report of zaya preflight ({error!r})") from error
    row = row_of(device)
    if row is None or row.name.strip("$") != machine.device:
        raise ConfigError(f"--preflight {path}: of {device}, not of --device {machine.device}")
    said = f"measured, {path.name}"
    if (product := rates["matrix product"]) is not None:
        machine = _with_product(machine, product * 1e12, said)
    if (copies := rates["memory"]) is not None:
        machine = replace(machine, copies=Rate(copies * GIGA, f"copy {said}"))
    if fit := fits["node"]:
        # Pairwise links: as many of them as the measured group has other ranks.
        peers = _ranks_of(curves, "node") - 1 if machine.inside.peers else None
        machine = replace(machine, inside=Link(*fit, said, peers))
    if fit := fits["between nodes"]:
        machine = replace(machine, between=Link(*fit, said))
    lacks = [f"no {check} measured" for check, rate in rates.items() if rate is None]
    lacks += [f"no usable all_reduce curve: {scope}" for scope, fit in fits.items() if not fit]
    if machine.dtype != "bf16":
        lacks.append(f"its product is of bf16, the run's are of {machine.dtype}")
    return replace(machine, lacks=tuple(lacks))


def _median(measured: list[dict[str, Any]], check: str) -> float | None:
    values = [m["value"] for m in measured if m["check"] == check]
    return statistics.median(values) if values else None


def _with_product(machine: Machine, rate: float, said: str) -> Machine:
    """A GPU's preflight multiplies in bf16; a run in fp32 keeps the data sheet's rates."""
    words = f"{rate / 1e12:,.1f} TFLOP/s {said}, x {MEASURED_SHARE:g} assumed"
    found = Rate(rate * MEASURED_SHARE, words)
    machine = replace(machine, by_dtype={**machine.by_dtype, "bf16": found})
    if machine.dtype != "bf16":
        return machine
    ratio = ATTENTION_SHARE / PRODUCT_SHARE
    attention = Rate(found.value * ratio, f"{words}, x {ratio:.2f} assumed for attention")
    return replace(machine, products=found, attention=attention)


def _line(curves: list[dict[str, Any]], scope: str) -> tuple[float, float] | None:
    """Bytes per second and seconds of a hop, from all-reduces of one scope, or None."""
    by_size: dict[float, list[float]] = defaultdict(list)
    hop_count = 1
    for curve in curves:
        if curve["scope"] == scope and curve["collective"] == "all_reduce":
            size = curve["message_kib"] * 1024 * bus_factor("all_reduce", curve["ranks"])
            by_size[size].append(size / (curve["gb_per_second"] * GIGA))
            hop_count = hops(curve["ranks"])
    if len(by_size) < 2:
        return None
    sizes = sorted(by_size)
    seconds = [statistics.median(by_size[size]) for size in sizes]
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    if slope <= 0:
        return None
    return 1 / slope, max(0.0, seconds[0] - slope * sizes[0]) / hop_count


def _ranks_of(curves: list[dict[str, Any]], scope: str) -> int:
    return max(int(curve["ranks"]) for curve in curves if curve["scope"] == scope)
