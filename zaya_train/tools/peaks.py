"""What devices can do at most, by their makers: for utilisation figures, never for a decision."""

from __future__ import annotations

import re

_PEAKS = (
    # Name as torch gives it, dense TFLOP/s of products in bf16 and in fp32 (no sparsity, no TF32).
    (r"MI300X|MI325X", 1307.4, 163.4),  # AMD Instinct MI300X, MI325X data sheets
    (r"MI350X", 2306.9, 144.2),  # AMD Instinct MI350X data sheet
    (r"MI355X", 2516.6, 157.3),  # AMD Instinct MI355X data sheet
    (r"H100 PCIe", 756.0, 51.0),  # NVIDIA H100 data sheet
    (r"H100 80GB HBM3|H200$", 989.4, 66.9),  # NVIDIA H100 (SXM) and H200 data sheets
    (r"A100", 312.0, 19.5),  # NVIDIA A100 data sheet
)


def peak_flops(device_name: str, compute_dtype: str) -> float | None:
    """FLOP/s of a device in bf16 or fp32; None for one that is not in the table."""
    for pattern, bf16, fp32 in _PEAKS:
        if re.search(pattern, device_name):
            return (bf16 if compute_dtype == "bf16" else fp32) * 1e12
    return None
