"""Residual scaling of the fp32 stream fused with the RMSNorm that follows (2605.05365, II-A3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_kernels.backends import pick
from zaya_kernels.norm_residual.eager import residual_eager, rms_norm_eager
from zaya_kernels.norm_residual.reference import residual_reference, rms_norm_reference

if TYPE_CHECKING:
    from torch import Tensor

RESIDUAL_BACKENDS = {"eager": residual_eager, "reference": residual_reference}
NORM_BACKENDS = {"eager": rms_norm_eager, "reference": rms_norm_reference}


@dataclass(frozen=True)
class ResidualScales:
    """Four vectors [D]; scales start at 1, biases at 0."""

    stream_scale: Tensor
    stream_bias: Tensor
    branch_scale: Tensor
    branch_bias: Tensor


def residual(stream: Tensor, branch: Tensor, scales: ResidualScales, backend: str) -> Tensor:
    """(stream + b_res) * a_res + (branch + b_out) * a_out, [B, S, D], in fp32 or higher."""
    run = pick("norm_residual", RESIDUAL_BACKENDS, backend)
    return run(
        stream,
        branch,
        scales.stream_scale,
        scales.stream_bias,
        scales.branch_scale,
        scales.branch_bias,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in fp32 or higher, returned in
    the dtype of `weight`."""
    return pick("norm_residual", NORM_BACKENDS, backend)(x, weight, eps)
