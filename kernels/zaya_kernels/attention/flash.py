"""torch's flash attention by its own operators, so that nothing chooses another form.

`scaled_dot_product_attention` picks one by device, dtype and heads; for fp32 with grouped heads on
a GPU that is the one that holds the whole matrix of scores, silently. On a CPU it is this one too
(`torch._fused_sdp_choice` says so for fp32, fp64 and bf16) and is left to run.

Legend: H query heads, K KV heads, Q queries, L keys, d head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

_aten = torch.ops.aten

REFUSAL = (
    "kernels.attention={backend}: no flash attention in {dtype} on {device}; set "
    "precision.compute_dtype=bf16, or kernels.attention=triton, or kernels.attention=reference, "
    "which holds a document's whole matrix of scores"
)
"""What is said of numbers that a device's flash kernel does not take."""


def check_flash(q: Tensor, backend: str) -> None:
    """ValueError in the name of `backend` where q's device has no flash kernel for its dtype."""
    if q.device.type != "cpu" and q.dtype.itemsize != 2:
        raise ValueError(REFUSAL.format(backend=backend, dtype=str(q.dtype), device=q.device.type))


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """q [1, H, Q, d], k and v [1, K, L, d] -> output [1, H, Q, d], log of sums [1, H, Q]."""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse


def flash_backward(
    grad: Tensor, tensors: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, shapes as in `flash`."""
    q, k, v = tensors
    if q.device.type == "cpu":
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_q, to_k, to_v = backward(grad, q, k, v, out, lse, 0.0, causal)
        return to_q, to_k, to_v
    # What dropout would need.
    seed = torch.zeros(2, dtype=torch.int64, device=q.device)
    offset = torch.zeros((), dtype=torch.int64, device=q.device)
    sizes = (q.shape[2], k.shape[2])
    backward = _aten._scaled_dot_product_flash_attention_backward
    to_q, to_k, to_v = backward(
        grad, q, k, v, out, lse, None, None, *sizes, 0.0, causal, seed, offset
    )
    return to_q, to_k, to_v


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flash(q, k, v, True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        return flash_backward(grad, (q, k, v), out, lse, True)


def flash_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [N, H, L, d], k and v [N, K, L, d] -> [N, H, L, d]; softmax scale 1 / sqrt(d)."""
    return _Causal.apply(q, k, v)
