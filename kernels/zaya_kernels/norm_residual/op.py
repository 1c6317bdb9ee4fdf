"""Residual scaling of the fp32 stream fused with the RMSNorm that follows (2605.05365, II-A3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_kernels.backends import named, pick
from zaya_kernels.norm_residual.eager import residual_eager, rms_norm_eager
from zaya_kernels.norm_residual.native import (
    residual_native,
    residual_norm_native,
    rms_norm_native,
    stream_norm_native,
)
from zaya_kernels.norm_residual.reference import residual_reference, rms_norm_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def _residual_triton(*tensors: Tensor) -> Tensor:
    from zaya_kernels.norm_residual.triton import residual_triton

    return residual_triton(*tensors)


def _rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from zaya_kernels.norm_residual.triton import rms_norm_triton

    return rms_norm_triton(x, weight, eps)


def _residual_norm_triton(
    stream: Tensor, branch: Tensor, scales: tuple[Tensor, ...], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from zaya_kernels.norm_residual.triton import residual_norm_triton

    return residual_norm_triton(stream, branch, scales, weight, eps)


def _stream_norm_triton(stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from zaya_kernels.norm_residual.triton import stream_norm_triton

    return stream_norm_triton(stream, weight, eps)


RESIDUAL_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "eager": residual_eager,
    "native": residual_native,
    "reference": residual_reference,
    "triton": _residual_triton,
}
NORM_BACKENDS = {
    "eager": rms_norm_eager,
    "native": rms_norm_native,
    "reference": rms_norm_reference,
    "triton": _rms_norm_triton,
}
FUSED: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], ...]] = {
    "native": (residual_norm_native, stream_norm_native),
    "triton": (_residual_norm_triton, _stream_norm_triton),
}
"""`residual_norm` and `stream_norm` of the back ends that have them as one pass."""


@dataclass(frozen=True)
class ResidualScales:
    """Four vectors [D]; scales start at 1, biases at 0."""

    stream_scale: Tensor
    stream_bias: Tensor
    branch_scale: Tensor
    branch_bias: Tensor


def residual(stream: Tensor, branch: Tensor, scales: ResidualScales, backend: str) -> Tensor:
    """(stream + b_res) * a_res + (branch + b_out) * a_out, [B, S, D], in fp32 or higher."""
    return pick("norm_residual", RESIDUAL_BACKENDS, backend)(stream, branch, *_vectors(scales))


def _vectors(scales: ResidualScales) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return scales.stream_scale, scales.stream_bias, scales.branch_scale, scales.branch_bias


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in fp32 or higher, returned in
    the dtype of `weight`."""
    return pick("norm_residual", NORM_BACKENDS, backend)(x, weight, eps)


def residual_norm(
    stream: Tensor,
    branch: Tensor,
    scales: ResidualScales,
    weight: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`residual`, and `rms_norm` of its result: the new stream and the next block's input.

    One pass over the stream where the back end fuses them (FUSED).
    """
    if backend in FUSED:
        fused = named("norm_residual", FUSED[backend][0])
        return fused(stream, branch, _vectors(scales), weight, eps)
    out = residual(stream, branch, scales, backend)
    return out, rms_norm(out, weight, eps, backend)


def stream_norm(stream: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """The stream as it is, and `rms_norm` of it.

    For a stream that is used again behind the norm: where the back end fuses (FUSED), the
    gradients of both uses meet in the norm's backward pass.
    """
    if backend in FUSED:
        return named("norm_residual", FUSED[backend][1])(stream, weight, eps)
    return stream, rms_norm(stream, weight, eps, backend)
