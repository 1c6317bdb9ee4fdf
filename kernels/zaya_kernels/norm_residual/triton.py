"""Residual scaling and the RMSNorm behind it, in one pass over the stream.

Fused: (x + b_res) a_res + (y + b_out) a_out, its mean square, and the normalised row; either half
alone is the same kernel with the other compiled out. Programs walk over rows with the vectors and,
in the backward, the four column sums in registers. Saved for backward: the operation's inputs and
one number per row; the scaled stream is made again from the inputs.

Column sums are added per program in a fixed order, then over programs by one reduction, so that
two runs agree bitwise.

Legend: N rows, D columns, R rows of a block, P programs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from zaya_kernels.launch import Config, architecture, launch, require_triton

if TYPE_CHECKING:
    from torch import Tensor

_FORWARD = Config({"R": 1}, num_warps=4, num_stages=1, programs_per_unit=6)
_BACKWARD = Config({"R": 1}, num_warps=4, num_stages=1, programs_per_unit=3)

# 2,048 columns of bf16 in pieces of 16 bytes are 256 lanes: 4 waves of AMD, 8 warps of NVIDIA.
CONFIGS = {
    "norm_residual_forward": {
        "gfx942": _FORWARD,
        "gfx950": _FORWARD,
        "sm_90": replace(_FORWARD, num_warps=8),
    },
    "norm_residual_backward": {
        "gfx942": _BACKWARD,
        "gfx950": _BACKWARD,
        "sm_90": replace(_BACKWARD, num_warps=8),
    },
}


@triton.jit
def _block(pointer, first, o_r, o_c, m, D: tl.constexpr):
    """Rows `first` + o_r of a contiguous [N, D], in fp32; addresses start from an int64 row."""
    return tl.load(pointer + tl.cast(first, tl.int64) * D + (o_r * D + o_c), mask=m, other=0.0).to(
        tl.float32
    )


@triton.jit
def norm_residual_forward(
    stream, branch, stream_scale, stream_bias, branch_scale, branch_bias, weight,
    out, normed, rstd,
    num_rows, num_programs, eps,
    D: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_c = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    o_r = tl.arange(0, R)[:, None]  # [R, 1]
    m_c = o_c < D
    if RESIDUAL:
        b_ss = tl.load(stream_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_bs = tl.load(branch_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_constant = b_ss * tl.load(stream_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_constant += b_bs * tl.load(branch_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if NORM:
        b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    for first in range(i_program * R, num_rows, num_programs * R):
        m = m_c & (first + o_r < num_rows)
        base = tl.cast(first, tl.int64) * D
        o = o_r * D + o_c
        b_x = _block(stream, first, o_r, o_c, m, D)  # [R, COLUMNS]
        if RESIDUAL:
            b_x = b_x * b_ss + b_constant + _block(branch, first, o_r, o_c, m, D) * b_bs
            tl.store(out + base + o, b_x.to(out.dtype.element_ty), mask=m)
        if NORM:
            square = tl.where(m, b_x * b_x, 0.0)
            b_rstd = tl.rsqrt(tl.sum(square, axis=1, keep_dims=True) / D + eps)  # [R, 1]
            tl.store(rstd + first + o_r, b_rstd, mask=first + o_r < num_rows)
            tl.store(normed + base + o, (b_x * b_rstd * b_w).to(normed.dtype.element_ty), mask=m)


@triton.jit
def norm_residual_backward(
    stream, branch, stream_scale, stream_bias, branch_scale, branch_bias, weight,
    rstd, grad_out, grad_normed, grad_stream, grad_branch, sums,
    num_rows, num_programs,
    D: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, GRAD_OUT: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_c = tl.arange(0, COLUMNS)[None, :]
    o_r = tl.arange(0, R)[:, None]
    m_c = o_c < D
    if RESIDUAL:
        b_ss = tl.load(stream_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_bs = tl.load(branch_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        if NORM:
            b_constant = b_ss * tl.load(stream_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_constant += b_bs * tl.load(branch_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if NORM:
        b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    a_total = tl.zeros([R, COLUMNS], tl.float32)
    a_stream = tl.zeros([R, COLUMNS], tl.float32)
    a_branch = tl.zeros([R, COLUMNS], tl.float32)
    a_weight = tl.zeros([R, COLUMNS], tl.float32)
    for first in range(i_program * R, num_rows, num_programs * R):
        m = m_c & (first + o_r < num_rows)
        base = tl.cast(first, tl.int64) * D
        o = o_r * D + o_c
        b_s = _block(stream, first, o_r, o_c, m, D)
        b_x = b_s
        if RESIDUAL:
            b_b = _block(branch, first, o_r, o_c, m, D)
            if NORM:
                b_x = b_s * b_ss + b_constant + b_b * b_bs
        if GRAD_OUT:
            b_g = _block(grad_out, first, o_r, o_c, m, D)
        else:
            b_g = tl.zeros([R, COLUMNS], tl.float32)
        if NORM:
            b_rstd = tl.load(rstd + first + o_r, mask=first + o_r < num_rows, other=0.0)
            b_n = b_x * b_rstd
            b_gn = _block(grad_normed, first, o_r, o_c, m, D)
            a_weight += b_gn * b_n
            b_gn = b_gn * b_w
            b_mean = tl.sum(b_gn * b_n, axis=1, keep_dims=True) / D
            b_g += (b_gn - b_n * b_mean) * b_rstd
        if RESIDUAL:
            a_total += b_g
            a_stream += b_g * b_s
            a_branch += b_g * b_b
            tl.store(grad_branch + base + o, (b_g * b_bs).to(grad_branch.dtype.element_ty), mask=m)
            b_g = b_g * b_ss
        tl.store(grad_stream + base + o, b_g.to(grad_stream.dtype.element_ty), mask=m)
    # sums [4, P, D]: weight, total, stream, branch.
    p_sums = sums + tl.cast(i_program, tl.int64) * D + tl.arange(0, COLUMNS)
    step = tl.cast(num_programs, tl.int64) * D
    m_d = tl.arange(0, COLUMNS) < D
    if NORM:
        tl.store(p_sums, tl.sum(a_weight, axis=0), mask=m_d)
    if RESIDUAL:
        tl.store(p_sums + step, tl.sum(a_total, axis=0), mask=m_d)
        tl.store(p_sums + 2 * step, tl.sum(a_stream, axis=0), mask=m_d)
        tl.store(p_sums + 3 * step, tl.sum(a_branch, axis=0), mask=m_d)


@dataclass(frozen=True)
class _Rows:
    """How a launch walks over [N, D]."""

    rows: int
    columns: int
    arch: str

    @classmethod
    def of(cls, x: Tensor) -> _Rows:
        return cls(x.numel() // x.shape[-1], x.shape[-1], architecture(x.device))

    def config(self, kernel: str) -> Config:
        return CONFIGS[kernel][self.arch]

    def programs(self, kernel: str) -> int:
        config = self.config(kernel)
        return config.programs(-(-self.rows // config.blocks["R"]), self.arch)

    def constants(self, residual: bool, norm: bool) -> dict[str, Any]:
        columns = 1 << (self.columns - 1).bit_length()
        return {"D": self.columns, "COLUMNS": columns, "RESIDUAL": residual, "NORM": norm}


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
        weight = vectors[4]
        walk = _Rows.of(stream)
        out = normed = rstd = None
        if branch is not None:
            out = torch.empty_like(stream, dtype=torch.float32)
        if weight is not None:
            normed = torch.empty_like(stream, dtype=weight.dtype)
            rstd = torch.empty(walk.rows, dtype=torch.float32, device=stream.device)
        name = "norm_residual_forward"
        programs = walk.programs(name)
        launch(
            norm_residual_forward, (programs,), walk.config(name),
            stream, branch, *vectors, out, normed, rstd, walk.rows, programs, eps,
            **walk.constants(branch is not None, weight is not None),
        )  # fmt: skip
        ctx.save_for_backward(stream, branch, rstd, *vectors)
        return stream.view_as(stream) if out is None else out, normed

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        stream, branch, rstd, *vectors = ctx.saved_tensors
        norm = grad_normed is not None
        walk = _Rows.of(stream)
        name = "norm_residual_backward"
        programs = walk.programs(name)
        sums = torch.empty(4, programs, walk.columns, dtype=torch.float32, device=stream.device)
        grad_stream = torch.empty_like(stream)
        grad_branch = None if branch is None else torch.empty_like(branch)
        grad_out, grad_normed = (
            g if g is None else g.contiguous() for g in (grad_out, grad_normed)
        )
        launch(
            norm_residual_backward, (programs,), walk.config(name),
            stream, branch, *vectors, rstd, grad_out, grad_normed,
            grad_stream, grad_branch, sums, walk.rows, programs,
            GRAD_OUT=grad_out is not None, **walk.constants(branch is not None, norm),
        )  # fmt: skip
        return grad_stream, grad_branch, None, *_vector_gradients(sums, vectors, norm)


def _vector_gradients(
    sums: Tensor, vectors: list[Tensor | None], norm: bool
) -> tuple[Tensor | None, ...]:
    """sums [4, P, D] to gradients of the scales, the biases and the weight."""
    grads: list[Tensor | None] = [None] * 5
    if norm and vectors[4] is not None:
        grads[4] = sums[0].sum(dim=0).to(vectors[4].dtype)
    if vectors[0] is not None:
        total, stream_dot, branch_dot = sums[1:].sum(dim=1)
        for at, dot in ((0, stream_dot), (2, branch_dot)):
            scale, bias = vectors[at], vectors[at + 1]
            assert scale is not None and bias is not None
            grads[at] = (dot + bias.float() * total).to(scale.dtype)
            grads[at + 1] = (scale.float() * total).to(bias.dtype)
    return tuple(grads)


def residual_triton(
    stream: Tensor,
    branch: Tensor,
    stream_scale: Tensor,
    stream_bias: Tensor,
    branch_scale: Tensor,
    branch_bias: Tensor,
) -> Tensor:
    """See `zaya_kernels.norm_residual.op.residual`."""
    vectors = (stream_scale, stream_bias, branch_scale, branch_bias)
    require_triton("norm_residual", stream, branch, *vectors)
    out, _ = _NormResidual.apply(stream.contiguous(), branch.contiguous(), 0.0, *vectors, None)
    return out


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `zaya_kernels.norm_residual.op.rms_norm`."""
    require_triton("norm_residual", x, weight)
    unused = (None, None, None, None)
    _, normed = _NormResidual.apply(x.contiguous(), None, eps, *unused, weight)
    return normed


def stream_norm_triton(stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.norm_residual.op.stream_norm`."""
    require_triton("norm_residual", stream, weight)
    unused = (None, None, None, None)
    kept, normed = _NormResidual.apply(stream.contiguous(), None, eps, *unused, weight)
    return kept, normed


def residual_norm_triton(
    stream: Tensor, branch: Tensor, scales: tuple[Tensor, ...], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.norm_residual.op.residual_norm`."""
    require_triton("norm_residual", stream, branch, weight, *scales)
    out, normed = _NormResidual.apply(
        stream.contiguous(), branch.contiguous(), eps, *scales, weight
    )
    return out, normed


def traffic(rows: int, columns: int, arch: str, backward: bool) -> tuple[int, int]:
    """Bytes that the fused operation moves in the forward or the backward, and the fewest possible,
    for a fp32 stream beside a bf16 branch and bf16 vectors.

    Moved: what the kernels of this file read and write, each byte once. Fewest: every input read
    and every output written once; column sums then cost one row.
    """
    size = rows * columns
    walk = _Rows(rows, columns, arch)
    if not backward:
        moved = size * (4 + 2 + 4 + 2) + 5 * 2 * columns
        return moved + 4 * rows, moved
    body = size * (4 + 2 + 4 + 2 + 4 + 2) + 5 * 2 * columns
    partial = 4 * walk.programs("norm_residual_backward") * columns * 4
    return body + 4 * rows + 2 * partial, body + 5 * 2 * columns


def layer_bytes(fused: bool, backward: bool) -> int:
    """Bytes per token and column that one layer's two norms and two residual scalings move, for a
    fp32 stream beside bf16 blocks: with the kernels as the model calls them, or (not `fused`) each
    by itself and autograd adding the stream's two gradients.

    The layer's second residual scaling stands alone, because the norm behind it is the next
    layer's, whose weight FSDP gathers later.
    """
    wide, narrow = 4, 2
    norm, residual = wide + narrow, 2 * wide + narrow
    if not backward:
        return norm + residual + (residual + narrow if fused else norm + residual)
    norm, residual, meeting = 2 * wide + narrow, 3 * wide + 2 * narrow, 3 * wide
    if not fused:
        return 2 * (norm + residual + meeting)
    return residual + (residual + narrow) + (norm + wide)
