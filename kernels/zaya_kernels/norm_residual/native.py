"""Residual scaling and RMSNorm in C, fused as in triton.py (native/norm_residual.c).

Saved for backward: the operation's inputs and one number per row. Column sums are taken over at
most sixteen parts of the rows, so that threads do not change them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from zaya_kernels.native.library import TYPES, call, check, check_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_PARTS = 16
_UNUSED = (None, None, None, None)


class _NormResidual(torch.autograd.Function):
    """Vectors are stream scale and bias, branch scale and bias, norm weight; None where unused.

    Without a branch the stream is handed on as it is, so that its gradient and the norm's meet in
    one pass.
    """

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, branch: Tensor | None, eps: float, *vectors: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        kept = stream
        stream, branch = stream.contiguous(), None if branch is None else branch.contiguous()
        weight, out, normed, rstd = vectors[4], None, None, None
        if branch is not None:
            out = torch.empty_like(stream, dtype=torch.float32)
        if weight is not None:
            normed = torch.empty_like(stream, dtype=weight.dtype)
            rstd = torch.empty(stream.shape[:-1], dtype=torch.float32)
        inputs = _inputs(stream, branch, vectors)
        call("zaya_norm_residual", _shape(stream, branch, weight, eps), inputs, out, normed, rstd)
        ctx.save_for_backward(stream, branch, rstd, *vectors)
        return kept.view_as(kept) if out is None else out, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        stream, branch, rstd, *vectors = ctx.saved_tensors
        shape = _shape(stream, branch, vectors[4], 0.0)
        parts, width = int(shape[-2]), stream.shape[-1]
        to_stream = torch.empty_like(stream)
        to_branch = None if branch is None else torch.empty_like(branch)
        sums = torch.zeros(parts, 4, width, dtype=torch.float64)
        to_vectors = torch.empty(5, width, dtype=torch.float32)
        given = (x if x is None else x.contiguous() for x in (grad_out, grad_normed))
        gradients = (rstd, *given, to_stream, to_branch, sums, to_vectors)
        call("zaya_norm_residual_backward", shape, _inputs(stream, branch, vectors), gradients)
        used = [branch is not None] * 4 + [grad_normed is not None]
        by_vector = (
            made.to(vector.dtype) if asked and vector is not None else None
            for made, vector, asked in zip(to_vectors, vectors, used, strict=True)
        )
        return to_stream, to_branch, None, *by_vector


def _shape(
    stream: Tensor, branch: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[int | float, ...]:
    """`Shape` of norm_residual.c; a tensor that is absent is of the other's type."""
    width = stream.shape[-1]
    rows = stream.numel() // max(width, 1)
    present = [x.dtype for x in (branch, weight) if x is not None]
    types = (TYPES[dtype] for dtype in (stream.dtype, present[0], present[-1]))
    return rows, width, *types, torch.get_num_threads(), max(1, min(rows, _PARTS)), eps


def _inputs(
    stream: Tensor, branch: Tensor | None, vectors: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """`Inputs` of norm_residual.c."""
    wide = (x if x is None else x.float().contiguous() for x in vectors)
    return stream, branch, *wide


def _check(*tensors: Tensor) -> None:
    """ValueError unless each is on the CPU, fp32 or bf16 (unlike types may meet), and a row like
    the first one's or of its shape."""
    shape = tensors[0].shape
    for tensor in tensors:
        check("norm_residual", tensor)
        check_shape("norm_residual", tensor, shape if tensor.ndim > 1 else shape[-1:])


def residual_native(
    stream: Tensor,
    branch: Tensor,
    stream_scale: Tensor,
    stream_bias: Tensor,
    branch_scale: Tensor,
    branch_bias: Tensor,
) -> Tensor:
    """See `zaya_kernels.norm_residual.op.residual`."""
    vectors = (stream_scale, stream_bias, branch_scale, branch_bias)
    _check(stream, branch, *vectors)
    out, _ = _NormResidual.apply(stream, branch, 0.0, *vectors, None)
    return out


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `zaya_kernels.norm_residual.op.rms_norm`."""
    _check(x, weight)
    _, normed = _NormResidual.apply(x, None, eps, *_UNUSED, weight)
    return normed


def stream_norm_native(stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.norm_residual.op.stream_norm`."""
    _check(stream, weight)
    kept, normed = _NormResidual.apply(stream, None, eps, *_UNUSED, weight)
    return kept, normed


def residual_norm_native(
    stream: Tensor, branch: Tensor, scales: tuple[Tensor, ...], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.norm_residual.op.residual_norm`."""
    _check(stream, branch, weight, *scales)
    out, normed = _NormResidual.apply(stream, branch, eps, *scales, weight)
    return out, normed
