"""Causal grouped-query attention over packed documents in Triton: one kernel forward, two backward.

Flash attention (arXiv 2205.14135, 2307.08691): a block's scores live in registers only. The tables
of `tiles` say which program takes which queries and keys, so a program meets no document but its
own, computes no block that is masked whole, and short documents are not padded. Chunks of a
context-parallel rank are read against the gathered keys where they lie.

Saved for backward: inputs, output and the base-2 logarithm of each row's sum. The kernel of the
queries' gradient also leaves each row's dot product of output and gradient behind for the kernel of
the keys' and values', whose programs sum over the heads of a group and over the segments of a
document: no atomics, two runs agree bitwise.

Legend: B batch, S queries and T keys of a row, H query heads, K KV heads, d head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.attention.tiles import TILE
from zaya_kernels.attention.triton_kernels import (
    attention_backward_keys,
    attention_backward_queries,
    attention_forward,
)
from zaya_kernels.launch import ARCHITECTURES, Config, architecture, launch, require_triton

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.attention.segments import AttentionPlan
    from zaya_kernels.attention.tiles import Tiles

_FORWARD = Config({"BM": 128, "BN": 64}, num_warps=8, num_stages=2)
_QUERIES = Config({"BM": 64, "BN": 32}, num_warps=4, num_stages=2)
_KEYS = Config({"BM": 32, "BN": 64}, num_warps=4, num_stages=2, waves_per_eu=1)

# sm_90 multiplies 64 rows at a time and has 255 registers a thread: more warps, longer blocks.
CONFIGS = {
    "attention_forward": {
        "gfx942": _FORWARD,
        "gfx950": _FORWARD,
        "sm_90": replace(_FORWARD, blocks={"BM": 128, "BN": 128}),
    },
    "attention_backward_queries": {
        "gfx942": _QUERIES,
        "gfx950": _QUERIES,
        "sm_90": replace(_QUERIES, blocks={"BM": 128, "BN": 64}, num_warps=8),
    },
    "attention_backward_keys": {
        "gfx942": _KEYS,
        "gfx950": _KEYS,
        "sm_90": replace(_KEYS, blocks={"BM": 32, "BN": 128}, num_warps=8),
    },
}
"""For head dims from 128 on; the tables below are for smaller ones and for fp32."""

# Half the channels, twice the keys: as many bytes a thread, which is what the wide LDS reads need.
_HALF_FORWARD = replace(_FORWARD, blocks={"BM": 128, "BN": 128})
_HALF_QUERIES = replace(_QUERIES, blocks={"BM": 64, "BN": 64}, waves_per_eu=1)
_HALF_KEYS = replace(_KEYS, blocks={"BM": 64, "BN": 128})
HALF_CONFIGS = {
    "attention_forward": dict.fromkeys(ARCHITECTURES, _HALF_FORWARD),
    "attention_backward_queries": dict.fromkeys(ARCHITECTURES, _HALF_QUERIES),
    "attention_backward_keys": {
        "gfx942": _HALF_KEYS,
        "gfx950": _HALF_KEYS,
        "sm_90": replace(_HALF_KEYS, num_warps=8),
    },
}

_WIDE = Config({"BM": 32, "BN": 32}, num_warps=4, num_stages=1)
WIDE_CONFIGS = {"gfx942": _WIDE, "gfx950": _WIDE, "sm_90": replace(_WIDE, num_warps=8)}
"""fp32, every kernel."""


@dataclass(frozen=True)
class _Call:
    """What every launch of one attention shares."""

    tiles: Tiles
    heads: int
    kv_heads: int
    size: int
    arch: str
    wide: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, tiles: Tiles) -> _Call:
        wide = q.dtype.itemsize == 4
        return cls(tiles, q.shape[1], k.shape[1], q.shape[2], architecture(q.device), wide)

    def config(self, kernel: str) -> Config:
        if self.wide:
            return WIDE_CONFIGS[self.arch]
        return (CONFIGS if self.size >= 128 else HALF_CONFIGS)[kernel][self.arch]

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "H": self.heads,
            "GROUP": self.heads // self.kv_heads,
            "D": self.size,
            "TILE": TILE,
            "CHEAP": self.arch == "gfx942" and not self.wide,
        }


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Elements from token to token and from head to head."""
    return tuple(x.stride(dim) for dim in (0, 1) for x in (q, k, v))


class _Attention(torch.autograd.Function):
    """q [B S, H, d], k and v [B T, K, d], whose channels are adjacent."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Tensor:
        call = _Call.of(q, k, tiles)
        config = call.config("attention_forward")
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        places = tiles.queries.shape[0] * TILE
        lse = torch.empty(call.heads, places, dtype=torch.float32, device=q.device)
        grid = (call.heads, tiles.queries.shape[0] * (TILE // config.blocks["BM"]))
        scale = call.size**-0.5 * math.log2(math.e)
        launch(
            attention_forward, grid, config, q, k, v, out, lse, tiles.queries, places,
            *_strides(q, k, v), scale, **call.constants,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        call, grad = _Call.of(q, k, tiles), grad.contiguous()
        numbers = (
            lse.shape[1], *_strides(q, k, v), call.size**-0.5 * math.log2(math.e), call.size**-0.5
        )  # fmt: skip
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        new = torch.empty if tiles.covered_keys == k.shape[0] else torch.zeros
        grad_k, grad_v = (new(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        delta = torch.empty_like(lse)
        config = call.config("attention_backward_queries")
        launch(
            attention_backward_queries,
            (call.heads, tiles.queries.shape[0] * (TILE // config.blocks["BM"])), config,
            q, k, v, out, lse, tiles.queries, grad, delta, grad_q, *numbers, **call.constants,
        )  # fmt: skip
        config = call.config("attention_backward_keys")
        launch(
            attention_backward_keys,
            (call.kv_heads, tiles.keys.shape[0] * (TILE // config.blocks["BN"])), config,
            q, k, v, lse, tiles.keys, tiles.segments, grad, delta, grad_k, grad_v, *numbers,
            **call.constants,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None


def attention_triton(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """See `zaya_kernels.attention.op.attention`."""
    require_triton("attention", q, k, v)
    size = q.shape[-1]
    if not 16 <= size <= 128 or size & (size - 1):
        raise ValueError(
            f"kernels.attention: triton takes head dims of 16, 32, 64 and 128, not {size}"
        )
    flat = (_with_unit_stride(x.flatten(0, 1)) for x in (q, k, v))
    out: Tensor = _Attention.apply(*flat, plan.tiles)
    return out.view(q.shape)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
