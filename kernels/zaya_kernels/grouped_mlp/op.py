"""SwiGLU experts over rows sorted by expert.

Legend: R rows, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_kernels.backends import pick
from zaya_kernels.grouped_mlp.eager import grouped_mlp_eager
from zaya_kernels.grouped_mlp.fp8_emulated import (
    grouped_mlp_fp8_emulated,
    grouped_mlp_fp8_emulated_fnuz,
)
from zaya_kernels.grouped_mlp.grouped_mm import grouped_mlp_grouped_mm
from zaya_kernels.grouped_mlp.native import grouped_mlp_native
from zaya_kernels.grouped_mlp.reference import grouped_mlp_reference
from zaya_kernels.grouped_mlp.transformer_engine import (
    grouped_mlp_transformer_engine,
    grouped_mlp_transformer_engine_fp8,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from zaya_kernels.grouped_mlp.types import MainGradients


def _grouped_mlp_triton(
    rows: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    recompute: bool = False,
    main: MainGradients | None = None,
) -> Tensor:
    from zaya_kernels.grouped_mlp.triton import grouped_mlp_triton

    return grouped_mlp_triton(rows, counts, gate_up, down, recompute=recompute, main=main)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "eager": grouped_mlp_eager,
    "grouped_mm": grouped_mlp_grouped_mm,
    "native": grouped_mlp_native,
    "reference": grouped_mlp_reference,
    "transformer_engine": grouped_mlp_transformer_engine,
    "triton": _grouped_mlp_triton,
}
FP8_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "fp8_emulated": grouped_mlp_fp8_emulated,
    "fp8_emulated_fnuz": grouped_mlp_fp8_emulated_fnuz,
    "transformer_engine": grouped_mlp_transformer_engine_fp8,
}
"""With products of eight-bit operands; the emulated ones have no other form."""
COUNTS_STAY_ON_DEVICE = frozenset({"grouped_mm", "triton"})
"""Back ends that do not ask the host how many rows an expert has."""


def grouped_mlp(
    rows: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    backend: str,
    *,
    recompute: bool = False,
    main: MainGradients | None = None,
    fp8: bool = False,
) -> Tensor:
    """rows [R, D] sorted by expert, counts [E] int64, gate_up [E, 2F, D] (gate first),
    down [E, D, F] -> [R, D]. Experts without rows are allowed; their gradients are zero.

    Of those COUNTS_STAY_ON_DEVICE: counts may be on the device and, summing to less than R, leave
    rows at the end out, whose output and gradient are not written. Other back ends need counts
    that sum to R. Of triton only: `recompute` makes the pre-activation again in the backward pass
    instead of keeping it; weight gradients are added to `main`, in fp32, and autograd gets none.
    fp8: every product of operands in eight bits, scaled per expert (fp8_emulated.py has the rule).

    Raises:
        ValueError: `recompute` or `main` with another back end than triton, or `fp8` with one that
            is not of FP8_BACKENDS, or the reverse.
    """
    chosen = pick("grouped_mlp", FP8_BACKENDS if fp8 else BACKENDS, backend)
    if not (recompute or main):
        return chosen(rows, counts, gate_up, down)
    if backend != "triton":
        raise ValueError(
            f"kernels.grouped_mlp: {backend} keeps the pre-activation and hands weight gradients "
            "to autograd; recompute and main gradients need triton"
        )
    return chosen(rows, counts, gate_up, down, recompute=recompute, main=main)
