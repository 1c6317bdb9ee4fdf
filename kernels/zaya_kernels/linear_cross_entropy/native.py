"""Loss in C: by chunks of supervised tokens, gradients taken while a chunk's logits are at hand.

As `eager`, with softmax and its gradient in two passes over a chunk's logits (native/loss.c). The
logits, their sums and all accumulation are fp32, also of bf16 operands; of those the gradient of
the logits is rounded to bf16 for the two products that follow (as in `triton`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from zaya_kernels.linear_cross_entropy.eager import chunk_rows, taken_gradients
from zaya_kernels.native.library import TYPES, call, check, check_shape
from zaya_kernels.native.product import multiply

if TYPE_CHECKING:
    from torch import Tensor


def _gradient(logits: Tensor, rows: Tensor) -> Tensor:
    """Where the gradient of `logits` goes."""
    return logits if rows.dtype == logits.dtype else torch.empty_like(logits, dtype=rows.dtype)


def _check_targets(targets: Tensor, classes: int) -> None:
    """IndexError unless all are classes: the library trusts them with its memory."""
    if isinstance(targets, FakeTensor) or not len(targets):
        return
    for label in map(int, targets.aminmax()):
        if not 0 <= label < classes:
            raise IndexError(f"linear_cross_entropy: label {label} is none of {classes} classes")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, how: tuple[int, float, bool]
    ) -> tuple[Tensor, Tensor]:
        ignore, z_loss, recorded = how
        kept = (labels != ignore).nonzero().squeeze(1)
        rows, targets = hidden.index_select(0, kept), labels[kept].long()
        _check_targets(targets, weight.shape[0])
        weight = weight.contiguous()
        need = recorded and any(ctx.needs_input_grad[:2])
        grad_rows = torch.empty(rows.shape, dtype=torch.float32) if need else None
        # The first chunk writes, the others add.
        fresh = torch.empty if len(rows) else torch.zeros
        grad_weight = fresh(weight.shape, dtype=torch.float32) if need else None
        losses, z_losses = (torch.empty(len(rows), dtype=torch.float32) for _ in range(2))
        classes, threads = weight.shape[0], torch.get_num_threads()
        step = chunk_rows(classes, 4)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            chunk = rows[part]
            logits = multiply(
                chunk, weight.t(), torch.empty(len(chunk), classes, dtype=torch.float32)
            )
            gradient = _gradient(logits, rows) if need else None
            sizes = len(chunk), classes
            call(
                "zaya_loss", *sizes, logits, targets[part], float(z_loss), losses[part],
                z_losses[part], gradient, TYPES[rows.dtype], threads,
            )  # fmt: skip
            if grad_rows is not None and grad_weight is not None and gradient is not None:
                multiply(gradient.t(), chunk, grad_weight, add=start > 0)
                multiply(gradient, weight, grad_rows[part])
        if need:
            ctx.save_for_backward(kept)
            ctx.gradients = (grad_rows, grad_weight)
            ctx.like = (hidden.shape, hidden.dtype)
        z = z_losses.sum()
        ctx.mark_non_differentiable(z)
        return losses.sum(), z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_rows, grad_weight = taken_gradients(ctx, grad)
        (kept,) = ctx.saved_tensors
        shape, dtype = ctx.like
        grad_hidden = grad_rows.new_zeros(shape, dtype=dtype)
        grad_hidden.index_copy_(0, kept, grad_rows.to(dtype))
        return grad_hidden, grad_weight.to(dtype), None, None


def linear_cross_entropy_native(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.linear_cross_entropy.op.linear_cross_entropy_and_z`; one type for both."""
    check("linear_cross_entropy", hidden, weight)
    check_shape("linear_cross_entropy", weight, (None, *hidden.shape[1:]))
    check_shape("linear_cross_entropy", labels, hidden.shape[:1])
    how = (ignore, z_loss, torch.is_grad_enabled())
    loss, z = _LinearCrossEntropy.apply(hidden, weight, labels, how)
    return loss, z
