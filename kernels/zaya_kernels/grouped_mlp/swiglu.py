"""SwiGLU between the experts' two products, of torch's elementwise operations.

Legend: R rows, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor


def swiglu(hidden: Tensor) -> Tensor:
    """Pre-activation [R, 2F], gate first -> silu(gate) * up [R, F]."""
    width = hidden.shape[1] // 2
    return torch.nn.functional.silu(hidden[:, :width]).mul_(hidden[:, width:])


def swiglu_backward(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activation [R, 2F] and the activation's gradient [R, F], which is overwritten -> the
    activation [R, F] again, and the pre-activation's gradient [R, 2F]."""
    width = hidden.shape[1] // 2
    gate, up = hidden[:, :width], hidden[:, width:]
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_hidden = torch.empty_like(hidden)
    torch.mul(grad, silu, out=grad_hidden[:, width:])
    # d silu(g) / dg = s + silu(g) (1 - s) with s = sigmoid(g).
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
    torch.mul(grad.mul_(up), slope, out=grad_hidden[:, :width])
    return silu.mul_(up), grad_hidden


class SwiGLU(torch.autograd.Function):
    """`swiglu` that keeps the pre-activation alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return swiglu(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        return swiglu_backward(hidden, grad.clone())[1]
