"""Choices of experts, and tokens' rows to their order and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from zaya_kernels.moe_permute.op import count_by_expert, gather, rest_of, scatter, sort_by_expert

from .kernels import random

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from zaya_kernels.moe_permute.types import Order

EXPERTS, TOKENS, HIDDEN = 5, 40, 24


def choices(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if name == "random":
        return torch.randint(0, EXPERTS + 1, (TOKENS,), generator=generator)
    if name == "long":
        # More blocks of tokens than one step of their sum takes.
        return torch.randint(0, EXPERTS + 1, (17_000,), generator=generator)
    if name == "skipped":
        return torch.full((3,), EXPERTS)
    if name == "none":
        return torch.zeros(0, dtype=torch.int64)
    return torch.full((TOKENS,), {"one": 2, "first": 0, "last": EXPERTS - 1}[name])


def ordered(choice: Tensor, backend: str, known: bool = False) -> Order:
    load = count_by_expert(choice, EXPERTS, backend)
    return sort_by_expert(load, int(load.counts[:-1].sum()) if known else None)


def there_and_back(
    name: str, known: bool, skip: str, backend: str, x: Mapping[str, Tensor]
) -> Sequence[Tensor]:
    """Rows with an expert, doubled, and back."""
    choice = choices(name)
    kept = int((choice < EXPERTS).sum())
    # The reference has no rows but those with an expert.
    order = ordered(choice, backend, known or backend == "reference")
    rows, left = gather(x["tokens"], order)
    assert rows.shape[0] == (kept if order.known is not None else choice.numel())
    if order.known is None:
        poison = torch.arange(rows.shape[0]).unsqueeze(1) >= kept
        rows = torch.where(poison, float("nan"), rows)
    rest = rest_of(left, order) if skip == "identity" else None
    return [rows[:kept], scatter(2 * rows, order, rest, x.get("probability"))]


def inputs_of(name: str, dtype: torch.dtype, hidden: int = HIDDEN) -> dict[str, Tensor]:
    tokens = choices(name).numel()
    made = {"tokens": random(tokens, hidden, seed=1), "probability": random(tokens, seed=2)}
    return {n: value.to(dtype) for n, value in made.items()}
