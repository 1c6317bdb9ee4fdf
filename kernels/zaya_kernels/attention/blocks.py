"""Causal attention as large matrix products, a block of queries at a time, in fp32 on the CPU;
bf16 comes and goes as such, and is computed in fp32 too, which is faster there than torch's flash.

torch's flash path multiplies small tiles with MKL; here the queries of all heads of a group stand
under each other, so that a block is one product of a few hundred rows in oneDNN (see `products`),
and a block's scores stay in the cache. Saved for backward: inputs and output; a block's
probabilities are made again.

Legend: N segments, L queries and keys each, H query heads, K KV heads, G = H / K, d head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from zaya_kernels.products import by_onednn, product

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_BLOCK = 128
"""Queries per block: more would compute more scores beyond the diagonal only to hide them."""
_SCORES = 2**23
"""Most scores at once, 32 MiB; long documents get smaller blocks."""


def worthwhile(q: Tensor, k: Tensor) -> bool:
    """Whether a block of q [N, L, H, d] by k [N, L, K, d] is work for oneDNN."""
    group = q.shape[2] // k.shape[2]
    block = q[0, :_BLOCK, :group].flatten(0, 1)
    return q.dtype in (torch.float32, torch.bfloat16) and by_onednn(block.float(), k.shape[1])


def _blocks(length: int, group: int) -> Iterator[slice]:
    """[start, end) of each block of queries."""
    size = max(1, min(_BLOCK, _SCORES // (group * length)))
    for start in range(0, length, size):
        yield slice(start, min(length, start + size))


def _stacked(x: Tensor, head: int, group: int) -> Tensor:
    """x [L, H, d] -> [L G, d] in fp32: the query heads of KV head `head`, token by token."""
    return x[:, head * group : (head + 1) * group].reshape(-1, x.shape[-1]).float()


def _head(x: Tensor, head: int) -> Tensor:
    """x [L, K, d] -> [L, d] in fp32."""
    return x[:, head].float().contiguous()


def _probabilities(queries: Tensor, keys: Tensor, block: slice) -> Tensor:
    """Scaled queries [l G, d] of the block, keys [end, d] -> [l G, end]."""
    scores = product(queries, keys.t())
    length = block.stop - block.start
    later = torch.ones(length, length, dtype=torch.bool, device=keys.device).triu(1)
    diagonal = scores.view(length, -1, block.stop)[:, :, block.start :]
    diagonal.masked_fill_(later.unsqueeze(1), float("-inf"))
    return torch.softmax(scores, dim=-1)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[2] // k.shape[2]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for n, head in ((n, head) for n in range(q.shape[0]) for head in range(k.shape[2])):
            keys, values = _head(k[n], head), _head(v[n], head)
            queries = _stacked(q[n], head, group) * q.shape[3] ** -0.5
            target = out[n, :, head * group : (head + 1) * group]
            for block in _blocks(q.shape[1], group):
                rows = slice(block.start * group, block.stop * group)
                weights = _probabilities(queries[rows], keys[: block.stop], block)
                target[block] = product(weights, values[: block.stop]).view(-1, group, q.shape[3])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out = ctx.saved_tensors
        group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        for n, head in ((n, head) for n in range(q.shape[0]) for head in range(k.shape[2])):
            keys, values = _head(k[n], head), _head(v[n], head)
            queries = _stacked(q[n], head, group) * scale
            grad_out = _stacked(grad[n], head, group)
            mean = torch.linalg.vecdot(grad_out, _stacked(out[n], head, group)).unsqueeze(-1)
            # Transposed, so that the products over queries turn the few columns and not the scores.
            to_keys, to_values = (x.new_zeros(x.shape[::-1]) for x in (keys, values))
            to_queries = torch.empty_like(queries)
            for block in _blocks(q.shape[1], group):
                seen, rows = block.stop, slice(block.start * group, block.stop * group)
                weights = _probabilities(queries[rows], keys[:seen], block)
                to_values[:, :seen] += product(grad_out[rows].t(), weights)
                # Softmax: d scores = weights (d weights - its mean under the weights).
                weights *= product(grad_out[rows], values[:seen].t()).sub_(mean[rows])
                to_queries[rows] = product(weights, keys[:seen])
                to_keys[:, :seen] += product(queries[rows].t(), weights)
            place = slice(head * group, (head + 1) * group)
            grad_q[n, :, place] = to_queries.mul_(scale).view(-1, group, q.shape[3])
            grad_k[n, :, head], grad_v[n, :, head] = to_keys.t(), to_values.t()
        return grad_q, grad_k, grad_v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [N, L, H, d], k and v [N, L, K, d] -> [N, L, H, d]; softmax scale 1 / sqrt(d)."""
    return _Causal.apply(q, k, v)
