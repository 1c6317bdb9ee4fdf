"""Readable CCA: one token at a time, any precision. The oracle of the other back ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.cca.types import CCAContext, CCAWeights


def _with_halo(x: Tensor, halo: Tensor | None, rows: int) -> Tensor:
    """[B, S, C] -> [B, n, rows + L, C]: each chunk behind the `rows` tokens that precede it."""
    batch, sequence, channels = x.shape
    if halo is None:
        halo = x.new_zeros(batch, 1, rows, channels)
    chunks = halo.shape[1]
    halo = halo[:, :, halo.shape[2] - rows :]
    return torch.cat([halo, x.view(batch, chunks, sequence // chunks, channels)], dim=2)


def _convolve(chunk: Tensor, positions: Tensor, weights: CCAWeights, head_dim: int) -> Tensor:
    """One chunk [rows + L, C] with its positions [L] -> [L, C]; taps stop at the document start."""
    taps0 = weights.depthwise.shape[1]
    heads, _, fan_in = weights.grouped.shape
    taps1 = fan_in // head_dim
    grouped = weights.grouped.view(heads, head_dim, head_dim, taps1)
    rows = taps0 + taps1 - 2
    outputs = []
    for t, position in enumerate(positions.tolist()):
        mixed = weights.grouped_bias.clone()
        for j in range(taps1):
            inner = weights.depthwise_bias.clone()
            for i in range(taps0):
                if position - j - i >= 0:
                    inner = inner + weights.depthwise[:, taps0 - 1 - i] * chunk[rows + t - j - i]
            per_head = torch.einsum(
                "hoi,hi->ho", grouped[..., taps1 - 1 - j], inner.view(heads, -1)
            )
            mixed = mixed + per_head.flatten()
        outputs.append(mixed)
    return torch.stack(outputs)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _normalise(x: Tensor) -> Tensor:
    eps = torch.finfo(torch.float32).eps
    return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(eps))


def cca_reference(
    qk: Tensor, v_now: Tensor, v_delayed: Tensor, weights: CCAWeights, context: CCAContext
) -> tuple[Tensor, Tensor, Tensor]:
    """See `zaya_kernels.cca.op.cca`; follows the numbered steps of arXiv 2605.05365, II-A."""
    dtype = qk.dtype
    work = torch.promote_types(dtype, torch.float32)
    qk = qk.to(work)
    batch, sequence, channels = qk.shape
    kv_heads = weights.temperature.shape[0]
    query_heads = context.num_query_heads
    head_dim = channels // (query_heads + kv_heads)
    group = query_heads // kv_heads

    weights = type(weights)(*(w.to(work) for w in vars(weights).values()))
    taps1 = weights.grouped.shape[2] // head_dim
    extended = _with_halo(qk, context.halo_qk, weights.depthwise.shape[1] + taps1 - 2)
    chunks = extended.shape[1]
    positions = context.positions.view(batch, chunks, -1)
    rows = [
        torch.cat(
            [_convolve(extended[b, c], positions[b, c], weights, head_dim) for c in range(chunks)]
        )
        for b in range(batch)
    ]
    convolved = torch.stack(rows).view(batch, sequence, -1, head_dim)

    q0, k0 = qk.view(batch, sequence, -1, head_dim).split([query_heads, kv_heads], dim=2)
    mean_q = (q0 + k0.repeat_interleave(group, dim=2)) / 2
    mean_k = mean_q.view(batch, sequence, kv_heads, group, head_dim).mean(dim=3)
    q = _normalise(convolved[:, :, :query_heads] + mean_q)
    k = _normalise(convolved[:, :, query_heads:] + mean_k) * weights.temperature[:, None]
    cos, sin = context.cos.to(work), context.sin.to(work)

    before = _with_halo(v_delayed, context.halo_v, 1)[:, :, :-1].reshape(v_delayed.shape)
    before = before * (context.positions > 0)[..., None]
    v = torch.cat([v_now, before], dim=-1).view(batch, sequence, kv_heads, head_dim)
    return _rotate(q, cos, sin).to(dtype), _rotate(k, cos, sin).to(dtype), v
