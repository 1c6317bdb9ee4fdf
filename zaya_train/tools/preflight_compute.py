"""One device by itself: matrix products, memory bandwidth, and equal bits for equal work."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zaya_train.runtime.peaks import product_rate
from zaya_train.tools.preflight_findings import Finding, Measured

if TYPE_CHECKING:
    from collections.abc import Callable

    from zaya_train.tools.preflight_findings import Place
    from zaya_train.tools.preflight_limits import Limits


@dataclass(frozen=True)
class Sizes:
    """How much work the checks do."""

    gemm: int
    """Rows and columns of the matrices."""
    copy_mib: int
    repeats: int
    disk_mib: int
    messages_kib: tuple[int, ...]
    """Bytes each rank hands to a collective."""


QUICK_GPU = Sizes(8192, 1024, 10, 64, (1024, 65536, 262144))
FULL_GPU = Sizes(16384, 8192, 50, 1024, (4, 64, 1024, 16384, 65536, 262144, 1048576))
QUICK_CPU = Sizes(256, 8, 3, 1, (16, 256))
FULL_CPU = Sizes(1024, 64, 5, 16, (4, 64, 1024, 4096))


def sizes_for(level: str, device: torch.device) -> Sizes:
    """By level (quick or full) and kind of device."""
    if device.type == "cuda":
        return FULL_GPU if level == "full" else QUICK_GPU
    return FULL_CPU if level == "full" else QUICK_CPU


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest of several runs after one that warms up; the device is idle around each."""
    best = float("inf")
    for number in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        if number:
            best = min(best, time.perf_counter() - begin)
    return max(best, 1e-9)


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU has nothing under way."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_findings(
    place: Place, device: torch.device, limits: Limits, local: int
) -> list[Finding]:
    """Number, memory and idleness of the devices. local: ranks of this node."""
    check = "device"
    if device.type != "cuda":
        return [Finding(check, place.node, "SKIP", "CPU", "no accelerator here", place.rank)]
    seen = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(device)
    total = properties.total_memory / 2**30
    value, rule = f"{seen} x {properties.name}", f"one for each of {local} ranks"
    found = [Finding.judged(check, place, seen >= local, value, rule)]
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    rule = "at least 90 % free: what a dead process holds is missing later"
    value = f"{free:.1f} of {total:.1f} GiB"
    found.append(Finding.judged("device memory free", place, free >= 0.9 * total, value, rule))
    if (least := limits.memory_gib) is not None:
        value, rule = f"{total:.1f} GiB", f"at least {least:g} GiB"
        found.append(Finding.judged("device memory", place, total >= least, value, rule))
    return found


def copy_rate(device: torch.device, mib: int, repeats: int) -> float:
    """Bytes read and written per second by a copy of so many MiB."""
    source = torch.ones(mib * 2**18, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / best_seconds(lambda: target.copy_(source), device, repeats)


def measure(place: Place, device: torch.device, sizes: Sizes, name: str) -> list[Measured]:
    """TFLOP/s of a matrix product and GB/s of a copy. name: of the device."""
    n = sizes.gemm
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    product = product_rate(device, dtype, sizes.repeats, n)
    copy = copy_rate(device, sizes.copy_mib, sizes.repeats)
    return [
        Measured("matrix product", place, product / 1e12, "TFLOP/s", name),
        Measured("memory", place, copy / 1e9, "GB/s", name),
    ]


def repeatable(place: Place, device: torch.device, sizes: Sizes) -> tuple[Finding, str]:
    """A product computed several times must have the same bits, here and on every device of the
    kind: a device that computes wrongly now and then is caught by nothing else.

    Returns the finding and the sha256 of the product, to be compared between ranks.
    """
    n = sizes.gemm
    # Made on the CPU: generators of devices differ.
    generator = torch.Generator().manual_seed(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.randn(n, n, generator=generator).to(device, dtype)
    right = torch.randn(n, n, generator=generator).to(device, dtype)
    first = left @ right
    same = all(torch.equal(left @ right, first) for _ in range(sizes.repeats))
    finite = bool(torch.isfinite(first).all())
    text = first.float().cpu().numpy().tobytes()
    value = "the same bits" if same else "bits differ from run to run"
    rule = f"{sizes.repeats} products of {n} x {n} equal the first, finite"
    found = Finding.judged("repeatable product", place, same and finite, value, rule)
    return found, hashlib.sha256(text).hexdigest()
