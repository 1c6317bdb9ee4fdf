"""Loss in chunks of supervised tokens, gradients taken while a chunk's logits are at hand.

Each chunk's logits are made once: forward turns them into softmax minus one-hot in place and
accumulates both gradients, so training costs the three matrix products of the plain loss and no
recomputation. Unsupervised tokens are dropped before the first product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.products import by_onednn, product

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_BYTES = 128 * 2**20
"""Most logits held at once (V = 262,272: 127 rows)."""
_CACHED_BYTES = 32 * 2**20
"""Logits that a processor's last-level cache holds; more rows than this allows only slow down."""
_CHUNK_ROWS = 128
"""Fewest rows within _CHUNK_BYTES: every chunk reads and writes the weight's whole gradient."""
VOCAB_BLOCK = 16_384
"""Rows of the weight or its gradient treated at once: 128 MiB at D = 2,048."""


def chunk_rows(vocab: int, itemsize: int) -> int:
    """Rows of logits of `itemsize` bytes to hold at once."""
    row = vocab * itemsize
    return max(1, min(_CHUNK_BYTES // row, max(_CHUNK_ROWS, _CACHED_BYTES // row)))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [c, D] in the working precision, weight [V, D] -> [c, V]."""
    if weight.dtype == hidden.dtype:
        return product(hidden, weight.t())
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], VOCAB_BLOCK):
        block = weight[start : start + VOCAB_BLOCK].to(hidden.dtype)
        part = out[:, start : start + VOCAB_BLOCK]
        if by_onednn(hidden, block.shape[0]):
            part.copy_(product(hidden, block.t()))
        else:
            torch.mm(hidden, block.t(), out=part)
    return out


def _grad_hidden(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """grad_logits [c, V] -> [c, D]."""
    if weight.dtype == grad_logits.dtype:
        return product(grad_logits, weight)
    out = grad_logits.new_zeros(grad_logits.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], VOCAB_BLOCK):
        block = weight[start : start + VOCAB_BLOCK].to(grad_logits.dtype)
        part = grad_logits[:, start : start + VOCAB_BLOCK]
        if by_onednn(part, block.shape[1]):
            out += product(part, block)
        else:
            out.addmm_(part, block)
    return out


def _add_grad_weight(grad_weight: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """grad_weight [V, D] += grad_logits [c, V].T @ hidden [c, D], without a second [V, D]."""
    for start in range(0, grad_weight.shape[0], VOCAB_BLOCK):
        block = slice(start, start + VOCAB_BLOCK)
        grad_weight[block].add_(product(grad_logits[:, block].t(), hidden))


def _one_chunk(
    rows: Tensor, target: Tensor, weight: Tensor, z_loss: float, grad_weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, of it z-loss if there is one, of rows [c, D] with target [c, 1], and their gradient if
    there is a `grad_weight` to add to. A function of its own, so that a chunk's logits are gone
    before the next one's are made."""
    logits = _logits(rows, weight)
    own = logits.gather(1, target) if z_loss else None
    scores = torch.log_softmax(logits, dim=-1)
    del logits
    chosen = scores.gather(1, target)
    # The sum's logarithm [c, 1], as exact as `chosen` and without another pass over all classes.
    size = None if own is None else own - chosen
    z = None if size is None else z_loss * size.square().sum()
    loss = -chosen.sum() if z is None else z - chosen.sum()
    if grad_weight is None:
        return loss, z, None
    grad_logits = scores.exp_()
    if size is not None:
        grad_logits.mul_(1.0 + 2.0 * z_loss * size)
    grad_logits.scatter_add_(1, target, -torch.ones_like(chosen))
    _add_grad_weight(grad_weight, grad_logits, rows)
    return loss, z, _grad_hidden(grad_logits, weight)


def taken_gradients(ctx: Any, grad: Tensor) -> list[Tensor]:
    """What forward left in `ctx.gradients`, times `grad`; RuntimeError the second time."""
    if ctx.gradients is None:
        raise RuntimeError("linear_cross_entropy: backward ran twice; its gradients were used up")
    # Scaled in place: a second [V, D] tensor would double the loss's memory.
    scaled = [g.mul_(grad) for g in ctx.gradients]
    ctx.gradients = None
    return scaled


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, how: tuple[int, float, bool]
    ) -> tuple[Tensor, Tensor]:
        ignore, z_loss, recorded = how
        work = torch.promote_types(hidden.dtype, torch.float32)
        kept = (labels != ignore).nonzero().squeeze(1)
        rows, targets = hidden.index_select(0, kept).to(work), labels[kept]
        need_grad = recorded and any(ctx.needs_input_grad[:2])
        grad_rows = torch.empty_like(rows) if need_grad else None
        grad_weight = torch.zeros_like(weight, dtype=work) if need_grad else None
        loss, z = (torch.zeros((), dtype=work, device=hidden.device) for _ in range(2))
        step = chunk_rows(weight.shape[0], rows.element_size())
        for start in range(0, rows.shape[0], step):
            chunk, target = rows[start : start + step], targets[start : start + step, None]
            chunk_loss, chunk_z, chunk_grad = _one_chunk(chunk, target, weight, z_loss, grad_weight)
            loss += chunk_loss
            if chunk_z is not None:
                z += chunk_z
            if grad_rows is not None and chunk_grad is not None:
                grad_rows[start : start + step] = chunk_grad
        if need_grad:
            ctx.save_for_backward(kept)
            ctx.gradients = (grad_rows, grad_weight)
            ctx.like = (hidden.shape, hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_rows, grad_weight = taken_gradients(ctx, grad)
        (kept,) = ctx.saved_tensors
        shape, hidden_dtype, weight_dtype = ctx.like
        grad_hidden = grad_rows.new_zeros(shape).index_copy_(0, kept, grad_rows)
        return grad_hidden.to(hidden_dtype), grad_weight.to(weight_dtype), None, None


def linear_cross_entropy_eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.linear_cross_entropy.op.linear_cross_entropy_and_z`."""
    # Within forward grad mode is always off and needs_input_grad ignores it, so it is asked here.
    how = (ignore, z_loss, torch.is_grad_enabled())
    loss, z = _LinearCrossEntropy.apply(hidden, weight, labels, how)
    return loss, z
