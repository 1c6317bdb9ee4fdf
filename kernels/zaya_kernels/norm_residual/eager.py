"""Residual scaling and RMSNorm with hand-written backward passes.

Autograd of the plain composition saves and re-reads five [B, S, D] intermediates; here the residual
saves its two inputs, the norm its input and one number per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, branch: Tensor, *scales: Tensor) -> Tensor:
        ctx.save_for_backward(stream, branch, *scales)
        work = torch.promote_types(stream.dtype, torch.float32)
        stream_scale, stream_bias, branch_scale, branch_bias = (s.to(work) for s in scales)
        # (x + b) a = x a + b a: the constant part is one vector.
        constant = stream_bias * stream_scale + branch_bias * branch_scale
        out = torch.addcmul(constant, stream.to(work), stream_scale)
        return out.addcmul_(branch.to(work), branch_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        stream, branch, *scales = ctx.saved_tensors
        stream_scale, stream_bias, branch_scale, branch_bias = (s.to(grad.dtype) for s in scales)
        flat = grad.reshape(-1, grad.shape[-1])
        total = flat.sum(dim=0)
        stream_dot = (flat * stream.reshape(flat.shape)).sum(dim=0)
        branch_dot = (flat * branch.reshape(flat.shape)).sum(dim=0)
        pieces = (
            stream_dot + stream_bias * total,
            stream_scale * total,
            branch_dot + branch_bias * total,
            branch_scale * total,
        )
        grad_scales = tuple(p.to(s.dtype) for p, s in zip(pieces, scales, strict=True))
        grad_stream = (grad * stream_scale).to(stream.dtype)
        return grad_stream, (grad * branch_scale).to(branch.dtype), *grad_scales


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(work)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, rstd)
        return ((wide * rstd).mul_(weight.to(work))).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        normed = x.to(rstd.dtype) * rstd
        scaled = grad * weight.to(rstd.dtype)
        mean = torch.linalg.vecdot(scaled, normed).unsqueeze_(-1).div_(x.shape[-1])
        grad_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(dim=0)
        grad_x = scaled.addcmul_(normed, mean, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def residual_eager(
    stream: Tensor,
    branch: Tensor,
    stream_scale: Tensor,
    stream_bias: Tensor,
    branch_scale: Tensor,
    branch_bias: Tensor,
) -> Tensor:
    """See `zaya_kernels.norm_residual.op.residual`."""
    return _Residual.apply(stream, branch, stream_scale, stream_bias, branch_scale, branch_bias)


def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `zaya_kernels.norm_residual.op.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)
