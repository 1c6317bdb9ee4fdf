"""CCA in vectorised torch operations; the CPU path.

The convolutions are sums over taps of shifted rows instead of library convolutions: no
transposition to channels-first, and document starts are a mask on the shifted rows. The per-head
mix is one batched matrix product per tap over strided views.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.cca.types import CCAContext, CCAWeights


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


def _depthwise(x: Tensor, positions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, n, rows + L, C] -> [B, n, rows + L - taps + 1, C]."""
    taps = weight.shape[1]
    length = x.shape[2] - taps + 1
    out = torch.addcmul(bias, x[:, :, taps - 1 :], weight[:, taps - 1])
    for back in range(1, taps):
        inside = (positions[:, :, taps - 1 :] >= back).unsqueeze(-1)
        start = taps - 1 - back
        shifted = x[:, :, start : start + length] * inside
        out = torch.addcmul(out, shifted, weight[:, taps - 1 - back])
    return out


def _grouped(x: Tensor, positions: Tensor, weight: Tensor, outside: Tensor, heads: int) -> Tensor:
    """x [B, n, taps - 1 + L, C], `outside` [C] for rows before a document -> [heads, B n L, d]."""
    head_dim = weight.shape[1]
    taps = weight.shape[2] // head_dim
    length = x.shape[2] - taps + 1
    per_tap = weight.view(heads, head_dim, head_dim, taps).permute(3, 0, 2, 1)
    out: Tensor | None = None
    for back in range(taps):
        start = taps - 1 - back
        rows = x[:, :, start : start + length]
        if back:
            inside = (positions[:, :, taps - 1 :] >= back).unsqueeze(-1)
            rows = torch.where(inside, rows, outside)
        rows = rows.reshape(-1, heads, head_dim).transpose(0, 1)
        tap = per_tap[taps - 1 - back]
        out = torch.bmm(rows, tap) if out is None else torch.baddbmm(out, rows, tap)
    assert out is not None
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def cca_eager(
    qk: Tensor, v_now: Tensor, v_delayed: Tensor, weights: CCAWeights, context: CCAContext
) -> tuple[Tensor, Tensor, Tensor]:
    """See `zaya_kernels.cca.op.cca`."""
    dtype = qk.dtype
    work = torch.promote_types(dtype, torch.float32)
    qk = qk.to(work)
    batch, sequence, channels = qk.shape
    kv_heads, query_heads = weights.temperature.shape[0], context.num_query_heads
    heads = query_heads + kv_heads
    head_dim = channels // heads
    chunks = 1 if context.halo_qk is None else context.halo_qk.shape[1]
    taps0, taps1 = weights.depthwise.shape[1], weights.grouped.shape[2] // head_dim
    rows = taps0 + taps1 - 2

    positions = _extended_positions(context.positions, chunks, rows)
    bias0 = weights.depthwise_bias.to(work)
    inner = _depthwise(
        _chunks(qk, context.halo_qk, rows), positions, weights.depthwise.to(work), bias0
    )
    mixed = _grouped(inner, positions[:, :, taps0 - 1 :], weights.grouped.to(work), bias0, heads)
    mixed = mixed.transpose(0, 1).view(batch, sequence, heads, head_dim)
    mixed = mixed + weights.grouped_bias.to(work).view(heads, head_dim)

    q, k = _add_means(qk.view(batch, sequence, heads, head_dim), mixed, query_heads)
    scale = head_dim**0.5
    eps = torch.finfo(torch.float32).eps
    q = q * (scale / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(eps))
    k = k * (scale / torch.linalg.vector_norm(k, dim=-1, keepdim=True).clamp_min(eps))
    k = k * weights.temperature.to(work)[:, None]
    cos, sin = context.cos.to(work).unsqueeze(2), context.sin.to(work).unsqueeze(2)
    v = _shift_values(v_now, v_delayed, context).view(batch, sequence, kv_heads, head_dim)
    return _rotate(q, cos, sin).to(dtype), _rotate(k, cos, sin).to(dtype), v


def _add_means(raw: Tensor, mixed: Tensor, query_heads: int) -> tuple[Tensor, Tensor]:
    """QK-mean: raw and mixed [B, S, H + K, d] -> q [B, S, H, d], k [B, S, K, d]."""
    q0, k0 = raw[:, :, :query_heads], raw[:, :, query_heads:]
    kv_heads = k0.shape[2]
    grouped = q0.unflatten(2, (kv_heads, -1))
    mean_q = (grouped + k0.unsqueeze(3)) * 0.5
    q = mixed[:, :, :query_heads] + mean_q.flatten(2, 3)
    k = mixed[:, :, query_heads:] + mean_q.mean(dim=3)
    return q, k


def _shift_values(v_now: Tensor, v_delayed: Tensor, context: CCAContext) -> Tensor:
    """[v_now_t ; v_delayed_(t-1)], zeros before a document's first token."""
    before = _chunks(v_delayed, context.halo_v, 1)[:, :, :-1].reshape(v_delayed.shape)
    before = before * (context.positions > 0).unsqueeze(-1)
    return torch.cat([v_now, before], dim=-1)
