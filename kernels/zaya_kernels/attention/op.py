"""Causal grouped-query attention over packed documents.

Legend: B batch, S local queries, T keys (S, or the gathered row under context parallelism),
H query heads, K KV heads, d head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_kernels.attention.eager import attention_eager, attention_sdpa
from zaya_kernels.attention.libraries import attention_aiter, attention_flash_attn
from zaya_kernels.attention.native import attention_native
from zaya_kernels.attention.reference import attention_reference
from zaya_kernels.backends import pick

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.attention.segments import AttentionPlan


def _triton(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    from zaya_kernels.attention.triton import attention_triton

    return attention_triton(q, k, v, plan)


BACKENDS = {
    "aiter": attention_aiter,
    "eager": attention_eager,
    "flash_attn": attention_flash_attn,
    "native": attention_native,
    "sdpa": attention_sdpa,
    "reference": attention_reference,
    "triton": _triton,
}


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, backend: str) -> Tensor:
    """q [B, S, H, d], k and v [B, T, K, d] -> [B, S, H, d]; softmax scale 1 / sqrt(d).

    A query sees the keys of its own document up to its own position, as `plan` says.
    """
    return pick("attention", BACKENDS, backend)(q, k, v, plan)
