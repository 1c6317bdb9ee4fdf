"""What devices can compute at most: for utilisation figures, never for a decision.

A device that is not in the table has no MFU by a data sheet. Beside it stands what a plain product
reaches on the device at hand, which is all there is for a CPU.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from zaya_train.runtime.device import describe

if TYPE_CHECKING:
    from zaya_train.config.precision import PrecisionConfig

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class DeviceRow:
    """One model of accelerator: dense products, no sparsity, no TF32."""

    name: str
    """Regular expression of the name that torch gives it."""
    units: int
    """Compute units (AMD) or streaming multiprocessors (NVIDIA). A partition shows fewer."""
    bf16_teraflops: float
    fp32_teraflops: float
    fp8_teraflops: float | None
    """None: multiplies in wider formats only."""
    clock_mhz: float
    """At which the maker states bf16; peak = units x clock x operations per unit and clock."""
    source: str

    def peak(self, compute_dtype: Dtype) -> float:
        """FLOP/s."""
        return 1e12 * (self.bf16_teraflops if compute_dtype == "bf16" else self.fp32_teraflops)


TABLE = (
    DeviceRow("MI300X", 304, 1307.4, 163.4, 2614.9, 2100, "AMD Instinct MI300X data sheet"),
    DeviceRow("MI325X", 304, 1307.4, 163.4, 2614.9, 2100, "AMD Instinct MI325X data sheet"),
    DeviceRow("MI350X", 256, 2306.9, 144.2, 4613.7, 2200, "AMD Instinct MI350X data sheet"),
    DeviceRow("MI355X", 256, 2516.6, 157.3, 5033.2, 2400, "AMD Instinct MI355X data sheet"),
    DeviceRow("H100 80GB HBM3", 132, 989.4, 66.9, 1978.9, 1830, "NVIDIA H100 data sheet, SXM"),
    DeviceRow("H100 PCIe", 114, 756.4, 51.2, 1512.8, 1620, "NVIDIA H100 data sheet, PCIe"),
    DeviceRow("A100", 108, 311.9, 19.5, None, 1410, "NVIDIA A100 data sheet"),
    DeviceRow("H200$", 132, 989.4, 66.9, 1978.9, 1830, "NVIDIA H200 data sheet, SXM"),
)

_GPU_SIZE, _CPU_SIZE = 8192, 512
"""Rows and columns of the measured product."""


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of one device for products of one dtype."""

    name: str
    data_sheet: float | None
    source: str
    measured: float
    experts: float | None = None
    """Of the data sheet for experts in fp8; None where they are in that one dtype, or where the
    sheet has none."""
    fp8_experts: bool = False

    def __str__(self) -> str:
        """In a line of a log."""
        own = f"a plain product reaches {self.measured / 1e12:,.4g} TFLOP/s"
        if self.data_sheet is None:
            return f"{own}; no data sheet peak known for {self.name}, so no MFU by it"
        fp8 = f", experts in fp8 of {self.experts / 1e12:,.1f}" if self.experts else ""
        return f"{own} of {self.data_sheet / 1e12:,.1f}{fp8} ({self.source})"

    def seconds_at_least(self, flops: float, expert_flops: float) -> float | None:
        """What `flops`, of which `expert_flops` are the experts', take at the data sheet's peaks;
        None where one of these is not known."""
        peak = self.experts if self.fp8_experts else self.data_sheet
        if self.data_sheet is None or peak is None:
            return None
        return (flops - expert_flops) / self.data_sheet + expert_flops / peak


def peak_flops(device_name: str, compute_dtype: Dtype, units: int | None = None) -> float | None:
    """FLOP/s by the maker of a device in bf16 or fp32; None for one that is not in the table.

    units: those torch sees; a device with others than its model's is a partition of one, or another
    model, and not known.
    """
    row = row_of(device_name, units)
    return row.peak(compute_dtype) if row else None


def peaks_of(device: torch.device, precision: PrecisionConfig) -> Peaks:
    """Of the device at hand; measures for some milliseconds."""
    name, row = describe(device).name, None
    if device.type == "cuda":
        row = row_of(name, torch.cuda.get_device_properties(device).multi_processor_count)
    compute_dtype, fp8 = precision.compute_dtype, precision.expert_dtype == "fp8"
    dtype = torch.bfloat16 if compute_dtype == "bf16" else torch.float32
    eight = row.fp8_teraflops if row and fp8 else None
    return Peaks(
        name=name,
        data_sheet=row.peak(compute_dtype) if row else None,
        source=row.source if row else "",
        measured=product_rate(device, dtype),
        experts=1e12 * eight if eight else None,
        fp8_experts=fp8,
    )


def product_rate(
    device: torch.device, dtype: torch.dtype, repeats: int = 8, rows: int | None = None
) -> float:
    """FLOP/s of a product of square matrices, the best of several after one that warms up.

    Of random numbers: a processor held back by its power limit multiplies ones faster.
    """
    size = rows or (_GPU_SIZE if device.type == "cuda" else _CPU_SIZE)
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for number in range(repeats + 1):
        _wait(device)
        begin = time.perf_counter()
        left @ left
        _wait(device)
        if number:
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / max(best, 1e-9)


def row_of(device_name: str, units: int | None = None) -> DeviceRow | None:
    """Of what torch calls a device; units as for `peak_flops`."""
    for row in TABLE:
        if re.search(rf"\b{row.name}", device_name):
            return row if units in (None, row.units) else None
    return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
