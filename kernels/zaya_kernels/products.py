"""Matrix products of the eager back ends.

torch.mm in fp32 on a CPU is MKL's, which keeps to AVX2 code on AMD processors; oneDNN, in the same
torch, compiles AVX-512 products for what the processor offers (one EPYC core, 2,048 rows by
512 x 768: 180 against 88 GFLOP/s). torch has no switch for fp32, so oneDNN's linear is called by
its operator, the one torch's own compiler emits. It compiles a kernel for every new shape, about a
millisecond, and keeps the last thousand or so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_PRODUCT = 2**21
"""Multiply-adds (20 microseconds) below which a call's overhead outweighs the faster kernel."""


def by_onednn(a: Tensor, n: int) -> bool:
    """Whether `product` of a [m, k] with a matrix of n columns runs in oneDNN."""
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.numel() * n >= SMALLEST_PRODUCT
        and torch.backends.mkldnn.is_available()
    )


def dense(x: Tensor) -> Tensor:
    """x [m, k], copied unless it or its transpose is contiguous.

    A second operand with gaps sends oneDNN to its reference loops, a thousand times slower.
    """
    if x.is_contiguous() or x.t().is_contiguous():
        return x
    return x.t().contiguous().t() if x.stride(0) == 1 else x.contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n] -> [m, n], outside autograd."""
    if by_onednn(a, b.shape[1]):
        return torch.ops.mkldnn._linear_pointwise(dense(a), dense(b).t(), None, "none", [], "")
    return torch.mm(a, b)


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """a [g, m, k] @ b [g, k, n] -> [g, m, n], outside autograd; one oneDNN call per matrix, which
    threads within a matrix and pays off even so."""
    if a.shape[0] and by_onednn(a[0], b.shape[2]):
        return torch.stack([product(left, right) for left, right in zip(a, b, strict=True)])
    return torch.bmm(a, b)


def batched_sum(base: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """beta * base + alpha * a @ b, shapes as in `batched_product`."""
    if a.shape[0] and by_onednn(a[0], b.shape[2]):
        return batched_product(a, b).mul_(alpha).add_(base, alpha=beta)
    return torch.baddbmm(base, a, b, beta=beta, alpha=alpha)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        # The bias goes into the operator: what selective recompute keeps must not change in place.
        flat = dense(x.reshape(-1, x.shape[-1]))
        out = torch.ops.mkldnn._linear_pointwise(flat, dense(weight), bias, "none", [], "")
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            product(flat, weight).view(x.shape) if need_x else None,
            product(flat.t(), x.reshape(-1, x.shape[-1])) if need_weight else None,
            flat.sum(dim=0) if need_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k], weight [n, k], bias [n] -> [..., n], as torch.nn.functional.linear."""
    if by_onednn(x, weight.shape[0]):
        return _Linear.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
