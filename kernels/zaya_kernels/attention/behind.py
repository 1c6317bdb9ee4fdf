"""Attention of a run of queries that stands behind earlier keys of its document.

Under context parallelism the queries of a chunk see their own keys causally and all earlier keys of
their document. No mask says so: the causal square and the full rectangle are two calls of the flash
kernel, merged by the logarithms of their sums (as ring attention does, arXiv 2310.01889). The
backward calls the kernel's own backward for each with the merged output and sum, which gives each
its share.

Legend: Q queries, P earlier keys, H query heads, K KV heads, d head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from zaya_kernels.attention.flash import flash, flash_backward

if TYPE_CHECKING:
    from torch import Tensor


def _batched(x: Tensor) -> Tensor:
    """[n, heads, d] -> [1, heads, n, d], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _flat(x: Tensor) -> Tensor:
    """[1, heads, n, d] -> [n, heads, d], a view."""
    return x.squeeze(0).transpose(0, 1)


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, *keys_values: Tensor) -> Tensor:
        queries = _batched(q)
        k, v, earlier_k, earlier_v = (_batched(x) for x in keys_values)
        own, own_lse = flash(queries, k, v, True)
        earlier, earlier_lse = flash(queries, earlier_k, earlier_v, False)
        lse = torch.logaddexp(own_lse, earlier_lse)
        out = own * (own_lse - lse).exp().unsqueeze(-1)
        out = out + earlier * (earlier_lse - lse).exp().unsqueeze(-1)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, *keys_values, out, lse)
        return _flat(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        *inputs, out, lse = ctx.saved_tensors
        q, k, v, earlier_k, earlier_v = (_batched(x) for x in inputs)
        grad = _batched(grad)
        to_q, to_k, to_v = flash_backward(grad, (q, k, v), out, lse, True)
        more, to_earlier_k, to_earlier_v = flash_backward(
            grad, (q, earlier_k, earlier_v), out, lse, False
        )
        return tuple(_flat(x) for x in (to_q + more, to_k, to_v, to_earlier_k, to_earlier_v))


def behind(q: Tensor, own: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor]) -> Tensor:
    """q [Q, H, d]; own keys and values [Q, K, d], seen causally; earlier ones [P, K, d], P > 0, all
    seen -> [Q, H, d]. Softmax scale 1 / sqrt(d)."""
    return _Behind.apply(q, *own, *earlier)
