"""CCA in C: convolutions, mean, norm, temperature and rotation in one pass (native/cca.c).

Saved for backward: the inputs; a block's rows are made again where they are needed. Weights'
gradients are summed over at most four parts of the rows, so that threads do not change them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from zaya_kernels.cca.eager import per_tap, shift_values
from zaya_kernels.native.library import TYPES, call, check, check_shape

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.cca.types import CCAContext, CCAWeights

_PARTS = 4


def _check_shapes(x: Tensor, weights: CCAWeights, context: CCAContext) -> None:
    """ValueError where the library would read past a tensor."""
    batch, tokens, channels = x.shape
    heads, size, mixed = weights.grouped.shape
    halo = context.halo_qk
    expected = {
        "qk": (x, (batch, tokens, heads * size)),
        "depthwise_bias": (weights.depthwise_bias, (channels,)),
        "depthwise": (weights.depthwise, (channels, None)),
        "grouped_bias": (weights.grouped_bias, (channels,)),
        "temperature": (weights.temperature, (heads - context.num_query_heads,)),
        "positions": (context.positions, (batch, tokens)),
        "cos": (context.cos, (batch, tokens, None)),
        "sin": (context.sin, context.cos.shape),
    }
    if halo is not None:
        check("cca", x, halo)
        expected["halo_qk"] = (halo, (batch, None, None, channels))
    for name, (tensor, shape) in expected.items():
        check_shape(f"cca: {name}", tensor, shape)
    kv_heads, angles = len(weights.temperature), context.cos.shape[2]
    if context.num_query_heads % kv_heads or mixed % size or 2 * angles > size:
        raise ValueError(
            f"cca: {context.num_query_heads} heads of queries, {kv_heads} of keys, of {size} "
            f"channels mixed from {mixed} and {2 * angles} rotated"
        )
    needed = weights.depthwise.shape[1] + mixed // size - 2
    if halo is not None and (halo.shape[2] < needed or tokens % halo.shape[1]):
        raise ValueError(
            f"cca: {tokens} tokens in {halo.shape[1]} chunks behind {halo.shape[2]} rows, "
            f"expected whole chunks behind at least {needed}"
        )


def _by_tokens(x: Tensor) -> Tensor:
    """x [B, S, C] with one stride from token to token, over rows too."""
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


class _QueriesKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, halo: Tensor | None, context: CCAContext, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [B, S, C] -> queries [B, S, H, d], keys [B, S, K, d]."""
        x, halo = _by_tokens(x), None if halo is None else halo.contiguous()
        shape, inputs = _arguments(x, halo, context, *weights)
        heads, kv_heads, size = shape[4:7]
        q = x.new_empty(*x.shape[:2], heads, size)
        k = x.new_empty(*x.shape[:2], kv_heads, size)
        call("zaya_cca", shape, inputs, q, k)
        ctx.save_for_backward(x, halo, *weights)
        ctx.context = context
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        x, halo, *weights = ctx.saved_tensors
        shape, inputs = _arguments(x, halo, ctx.context, *weights)
        parts = shape[-1]
        to_x = torch.empty(x.shape, dtype=x.dtype)
        to_halo = None if halo is None else halo.new_zeros(*halo.shape[:2], shape[2], halo.shape[3])
        heads, size, mixed = weights[2].shape
        by_taps = torch.zeros(parts, heads, mixed, size, dtype=torch.float32)
        depth, depth_bias, mix_bias, temperature = (
            torch.zeros(parts, *weights[i].shape, dtype=torch.float64) for i in (0, 1, 3, 4)
        )
        sums = (by_taps, depth, depth_bias, mix_bias, temperature)
        gradients = (grad_q.contiguous(), grad_k.contiguous(), to_x, to_halo)
        call("zaya_cca_backward", shape, inputs, (*gradients, *sums))
        mix = by_taps.sum(0).view(heads, -1, size, size).permute(0, 3, 2, 1).flip(3)
        vectors = [x.sum(0) for x in (depth, depth_bias, mix_bias, temperature)]
        found = (*vectors[:2], mix.reshape(weights[2].shape), *vectors[2:])
        if halo is not None and to_halo is not None:
            to_halo = torch.nn.functional.pad(to_halo, (0, 0, halo.shape[2] - shape[2], 0))
        return to_x, to_halo, None, *(g.to(w.dtype) for g, w in zip(found, weights, strict=True))


def _arguments(
    x: Tensor, halo: Tensor | None, context: CCAContext, *weights: Tensor
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """`Shape` and `Inputs` of cca.c."""
    depth, depth_bias, grouped, mix_bias, temperature = (w.float().contiguous() for w in weights)
    size, kv_heads = grouped.shape[1], len(temperature)
    taps = depth.shape[1], grouped.shape[2] // size
    chunks, given = (1, 0) if halo is None else halo.shape[1:3]
    rows = x.shape[0] * chunks
    shape = (
        *(rows, x.shape[0] * x.shape[1] // rows, sum(taps) - 2, given),
        *(context.num_query_heads, kv_heads, size, *taps, 2 * context.cos.shape[-1]),
        *(x.stride(1), TYPES[x.dtype], torch.get_num_threads(), min(rows, _PARTS)),
    )
    tables = (
        t.contiguous() for t in (context.positions.long(), context.cos.float(), context.sin.float())
    )
    mix = per_tap(grouped, taps[1]).contiguous()
    return shape, (x, halo, *tables, depth, depth_bias, mix, mix_bias, temperature)


def cca_native(
    qk: Tensor, v_now: Tensor, v_delayed: Tensor, weights: CCAWeights, context: CCAContext
) -> tuple[Tensor, Tensor, Tensor]:
    """See `zaya_kernels.cca.op.cca`."""
    check("cca", qk, v_now, v_delayed)
    _check_shapes(qk, weights, context)
    q, k = _QueriesKeys.apply(qk, context.halo_qk, context, *weights.in_order())
    return q, k, shift_values(v_now, v_delayed, context).view_as(k)
