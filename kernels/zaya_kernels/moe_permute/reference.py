"""Readable permutation of tokens by expert, any precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_kernels.moe_permute.types import Load

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.moe_permute.types import Order


def count(choice: Tensor, num_experts: int) -> Load:
    """See `zaya_kernels.moe_permute.op.count_by_expert`."""
    counts = [int((choice == e).sum()) for e in range(num_experts + 1)]
    return Load(choice, torch.tensor(counts, device=choice.device), "reference")


def sort(load: Load) -> Tensor:
    """See `zaya_kernels.moe_permute.op.sort_by_expert`."""
    tokens, classes = load.choice.tolist(), load.counts.numel()
    order = [t for e in range(classes) for t, c in enumerate(tokens) if c == e]
    return torch.tensor(order, dtype=torch.int64, device=load.choice.device)


def gather(tokens: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.moe_permute.op.gather`."""
    return tokens[order.order[: order.num_rows]], tokens


def rest(base: Tensor, order: Order) -> Tensor:
    """See `zaya_kernels.moe_permute.op.rest_of`."""
    return base


def scatter(rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None) -> Tensor:
    """See `zaya_kernels.moe_permute.op.scatter`."""
    kept = int(order.counts[:-1].sum())
    left = order.order.numel() - kept
    base = rows.new_zeros(left, rows.shape[1]) if rest is None else rest[order.order[kept:]]
    out = torch.cat([rows[:kept], base])[torch.argsort(order.order)]
    return out if probability is None else out * probability.unsqueeze(1)
