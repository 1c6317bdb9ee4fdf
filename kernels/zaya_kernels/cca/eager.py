"""CCA in vectorised torch operations with a hand-written backward; the CPU path.

Convolutions are sums over shifted rows, without a turn to channels-first. Where a shift reaches
before a document, the few rows concerned are overwritten by index instead of masking every row.
The taps of the per-head mix lie side by side, so that it is one batched product. Saved for
backward: the padded inputs, the unnormalised queries and keys and their norms; the convolutions'
inner rows are made again.

Legend: B batch, n chunks per row, L tokens per chunk, N = B n L, h rows before a chunk,
H query heads, K KV heads, A = H + K, d head dim, C = A d, r rotated channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.products import batched_product

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.cca.types import CCAContext, CCAWeights

_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class _Plan:
    """What the operation needs besides differentiable tensors."""

    query_heads: int
    kv_heads: int
    taps: tuple[int, int]
    positions: Tensor
    """[B, n, h + L] int64; negative where a row lies before the document of the chunk's start."""
    cos: Tensor
    """[N, 1, r / 2]."""
    sin: Tensor

    def outside(self, back: int, first: int) -> Tensor:
        """Indices among the flattened rows from `first` on whose `back`-th predecessor belongs to
        another document."""
        return (self.positions[:, :, first:] < back).flatten().nonzero().squeeze(1)


def _chunks(x: Tensor, halo: Tensor | None, rows: int) -> Tensor:
    """[B, S, C] -> [B, n, rows + L, C], each chunk behind the `rows` tokens before it."""
    batch, sequence, channels = x.shape
    if halo is None:
        return torch.nn.functional.pad(x, (0, 0, rows, 0)).unsqueeze(1)
    count = halo.shape[1]
    body = x.view(batch, count, sequence // count, channels)
    return torch.cat([halo[:, :, halo.shape[2] - rows :], body], dim=2)


def _extended_positions(positions: Tensor, chunks: int, rows: int) -> Tensor:
    """Positions [B, S] -> [B, n, rows + L]; negative where the row is before the document."""
    body = positions.view(positions.shape[0], chunks, -1)
    before = body[:, :, :1] - torch.arange(rows, 0, -1, device=positions.device)
    return torch.cat([before, body], dim=2)


def _shifted(x: Tensor, back: int, taps: int) -> Tensor:
    """View of x [B, n, taps - 1 + l, C]: the `back`-th predecessors [B, n, l, C]."""
    start = taps - 1 - back
    return x[:, :, start : start + x.shape[2] - taps + 1]


def _inside(x: Tensor, back: int, taps: int, outside: Tensor, fill: Tensor | float) -> Tensor:
    """Copy [B n l, C] of `_shifted` with `fill` (a number or [C]) in the rows `outside`."""
    rows = _shifted(x, back, taps).clone(memory_format=torch.contiguous_format)
    rows = rows.view(-1, x.shape[-1])
    rows[outside] = fill
    return rows


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, plan: _Plan) -> Tensor:
    """x [B, n, h + L, C] -> [B, n, h + L - taps + 1, C]."""
    taps = weight.shape[1]
    out = torch.addcmul(bias, x[:, :, taps - 1 :], weight[:, -1])
    for back in range(1, taps):
        rows = _inside(x, back, taps, plan.outside(back, taps - 1), 0.0)
        out.view(-1, x.shape[-1]).addcmul_(rows, weight[:, taps - 1 - back])
    return out


def _unfold(inner: Tensor, bias: Tensor, plan: _Plan) -> Tensor:
    """inner [B, n, taps - 1 + L, C] -> [N, A, taps d], newest tap first; `bias` [C] is what the
    depthwise convolution makes of the zeros before a document."""
    taps = plan.taps[1]
    heads = plan.query_heads + plan.kv_heads
    first = sum(plan.taps) - 2
    rows = [_shifted(inner, 0, taps).reshape(-1, heads, inner.shape[-1] // heads)]
    for back in range(1, taps):
        shifted = _inside(inner, back, taps, plan.outside(back, first), bias)
        rows.append(shifted.view(rows[0].shape))
    return rows[0] if taps == 1 else torch.cat(rows, dim=-1)


def per_tap(grouped: Tensor, taps: int) -> Tensor:
    """[A, d_out, d_in taps] -> [A, taps d_in, d_out], newest tap first."""
    heads, size, _ = grouped.shape
    newest_first = grouped.view(heads, size, size, taps).flip(3)
    return newest_first.permute(0, 3, 2, 1).reshape(heads, taps * size, size)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [N, heads, d] in place."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = second * cos
    turned.addcmul_(first, sin)
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.copy_(turned)
    return x


class _QueriesKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        depthwise: Tensor,
        depthwise_bias: Tensor,
        grouped: Tensor,
        grouped_bias: Tensor,
        temperature: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        """x [B, n, h + L, C] -> queries [N, H, d], keys [N, K, d]."""
        inner = _depthwise(x, depthwise, depthwise_bias, plan)
        unfolded = _unfold(inner, depthwise_bias, plan)
        size = grouped.shape[1]
        mixed = batched_product(unfolded.transpose(0, 1), per_tap(grouped, plan.taps[1]))
        mixed = mixed.transpose(0, 1) + grouped_bias.view(-1, size)
        _add_means(mixed, x, plan)
        norm = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
        inverse = size**0.5 / norm.clamp_min(_EPS)
        ctx.save_for_backward(x, depthwise, depthwise_bias, grouped, temperature, mixed, norm)
        ctx.plan = plan
        heads = plan.query_heads
        queries = mixed[:, :heads] * inverse[:, :heads]
        keys = mixed[:, heads:] * (inverse[:, heads:] * temperature[:, None])
        return _turn(queries, plan.cos, plan.sin), _turn(keys, plan.cos, plan.sin)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        x, depthwise, bias, grouped, temperature, mixed, norm = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grad = torch.cat([grad_q, grad_k], dim=1)
        _turn(grad, plan.cos, -plan.sin)
        grad, grad_temperature = _norm_backward(grad, mixed, norm, temperature, plan.query_heads)
        inner = _depthwise(x, depthwise, bias, plan)
        unfolded = _unfold(inner, bias, plan)
        per_head = grad.transpose(0, 1)
        grad_tap = batched_product(unfolded.permute(1, 2, 0), per_head)
        grad_unfolded = batched_product(per_head, per_tap(grouped, plan.taps[1]).mT)
        del unfolded
        grad_inner, grad_bias = _unfold_backward(grad_unfolded, inner.shape, plan)
        grad_x, grad_depthwise = _depthwise_backward(grad_inner, x, depthwise, plan)
        grad_bias += grad_inner.flatten(0, 2).sum(dim=0)
        _means_backward(grad_x, grad, plan)
        heads, size = grouped.shape[:2]
        grad_grouped = grad_tap.view(heads, plan.taps[1], size, size).permute(0, 3, 2, 1).flip(3)
        return (
            grad_x,
            grad_depthwise,
            grad_bias,
            grad_grouped.reshape(grouped.shape),
            grad.sum(dim=0).flatten(),
            grad_temperature,
            None,
        )


def _parts(x: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """x [B, n, h + L, C] without halos, as queries [B, n, L, K, H / K, d], keys [B, n, L, K, d]."""
    heads = plan.query_heads + plan.kv_heads
    body = x[:, :, sum(plan.taps) - 2 :].unflatten(3, (heads, -1))
    queries, keys = body.split([plan.query_heads, plan.kv_heads], dim=3)
    return queries.unflatten(3, (plan.kv_heads, -1)), keys


def _add_means(mixed: Tensor, x: Tensor, plan: _Plan) -> None:
    """QK-mean: mixed [N, A, d] += half of each query and its key, half of a key and its queries'
    mean."""
    raw_q, raw_k = _parts(x, plan)
    mixed = mixed.view(*raw_k.shape[:3], -1, mixed.shape[-1])
    q, k = mixed.split([plan.query_heads, plan.kv_heads], dim=3)
    q = q.unflatten(3, (plan.kv_heads, -1))
    q.add_(raw_q, alpha=0.5).add_(raw_k.unsqueeze(4), alpha=0.5)
    k.add_(raw_k, alpha=0.5).add_(raw_q.mean(dim=4), alpha=0.5)


def _means_backward(grad_x: Tensor, grad: Tensor, plan: _Plan) -> None:
    """Adds to grad_x [B, n, h + L, C] what `_add_means` hands back of grad [N, A, d]."""
    to_q, to_k = _parts(grad_x, plan)
    grad = grad.view(*to_k.shape[:3], -1, grad.shape[-1])
    q, k = grad.split([plan.query_heads, plan.kv_heads], dim=3)
    q = q.unflatten(3, (plan.kv_heads, -1))
    to_q.add_(q, alpha=0.5).add_(k.unsqueeze(4), alpha=0.5 / q.shape[4])
    to_k.add_(k, alpha=0.5).add_(q.sum(dim=4), alpha=0.5)


def _norm_backward(
    grad: Tensor, mixed: Tensor, norm: Tensor, temperature: Tensor, query_heads: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the unnormalised [N, A, d] and of the temperature [K]; `grad` is overwritten."""
    inverse = mixed.shape[-1] ** 0.5 / norm.clamp_min(_EPS)
    dot = torch.linalg.vecdot(grad, mixed).unsqueeze(-1)
    grad_temperature = (dot * inverse)[:, query_heads:, 0].sum(dim=0)
    scale = inverse.clone()
    scale[:, query_heads:] *= temperature[:, None]
    # Below the floor of the norm the scale is a constant.
    pull = torch.where(norm > _EPS, dot * scale / norm.clamp_min(_EPS).square(), 0.0)
    return grad.mul_(scale).addcmul_(mixed, pull, value=-1), grad_temperature


def _unfold_backward(grad: Tensor, inner_shape: torch.Size, plan: _Plan) -> tuple[Tensor, Tensor]:
    """grad [A, N, taps d] -> gradients of the inner rows and of the depthwise bias [C]."""
    taps, first = plan.taps[1], sum(plan.taps) - 2
    size = grad.shape[2] // taps
    grad_inner = grad.new_zeros(inner_shape)
    grad_bias = grad.new_zeros(inner_shape[-1])
    for back in range(taps):
        part = (
            grad[..., back * size : (back + 1) * size].transpose(0, 1).reshape(-1, len(grad_bias))
        )
        if back:
            outside = plan.outside(back, first)
            grad_bias += part[outside].sum(dim=0)
            part[outside] = 0.0
        target = _shifted(grad_inner, back, taps)
        target.add_(part.view(target.shape))
    return grad_inner, grad_bias


def _depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Gradients of the padded inputs [B, n, h + L, C] and of the weight [C, taps]."""
    taps, channels = weight.shape[1], x.shape[-1]
    grad_x, grad_weight = torch.zeros_like(x), torch.empty_like(weight)
    flat = grad.view(-1, channels)
    for back in range(taps):
        column = taps - 1 - back
        outside = plan.outside(back, taps - 1) if back else plan.positions.new_empty(0)
        rows = _inside(x, back, taps, outside, 0.0)
        grad_weight[:, column] = rows.mul_(flat).sum(dim=0)
        part = torch.mul(flat, weight[:, column], out=rows)
        part[outside] = 0.0
        target = _shifted(grad_x, back, taps)
        target.add_(part.view(target.shape))
    return grad_x, grad_weight


def cca_eager(
    qk: Tensor, v_now: Tensor, v_delayed: Tensor, weights: CCAWeights, context: CCAContext
) -> tuple[Tensor, Tensor, Tensor]:
    """See `zaya_kernels.cca.op.cca`."""
    work = torch.promote_types(qk.dtype, torch.float32)
    batch, sequence, channels = qk.shape
    kv_heads, query_heads = weights.temperature.shape[0], context.num_query_heads
    head_dim = channels // (query_heads + kv_heads)
    taps = (weights.depthwise.shape[1], weights.grouped.shape[2] // head_dim)
    rows = sum(taps) - 2
    chunks = 1 if context.halo_qk is None else context.halo_qk.shape[1]
    plan = _Plan(
        query_heads=query_heads,
        kv_heads=kv_heads,
        taps=taps,
        positions=_extended_positions(context.positions, chunks, rows),
        cos=context.cos.to(work).flatten(0, 1).unsqueeze(1),
        sin=context.sin.to(work).flatten(0, 1).unsqueeze(1),
    )
    padded = _chunks(qk, context.halo_qk, rows).to(work)
    q, k = _QueriesKeys.apply(padded, *(t.to(work) for t in weights.in_order()), plan)
    v = shift_values(v_now, v_delayed, context)
    shape = (batch, sequence, -1, head_dim)
    return q.view(shape).to(qk.dtype), k.view(shape).to(qk.dtype), v.view(shape)


def shift_values(v_now: Tensor, v_delayed: Tensor, context: CCAContext) -> Tensor:
    """[v_now_t ; v_delayed_(t-1)], zeros before a document's first token."""
    before = _chunks(v_delayed, context.halo_v, 1)[:, :, :-1].reshape(v_delayed.shape)
    before = before * (context.positions > 0).unsqueeze(-1)
    return torch.cat([v_now, before], dim=-1)
