"""Tensors of more elements than 32 bits count; pages that nobody touches cost nothing."""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytest
    from torch import Tensor

_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: more than memory and swap may be mapped.
_LARGE = 2**24


def vast(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are written only."""
    count = math.prod(shape)
    if count * dtype.itemsize < _LARGE:
        return torch.full(shape, 0, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def allocate_vast(patch: pytest.MonkeyPatch) -> None:
    """Let operations get their memory from `vast`; for tests without poisoned memory."""

    def by_shape(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        return vast(shape if not shape or isinstance(shape[0], int) else tuple(shape[0]), dtype)

    def like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return vast(tuple(x.shape), dtype or x.dtype)

    def new(x: Tensor, *shape: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return by_shape(*shape, dtype=dtype or x.dtype)

    for name in ("empty", "zeros"):
        patch.setattr(torch, name, by_shape)
    for name in ("empty_like", "zeros_like"):
        patch.setattr(torch, name, like)
    patch.setattr(torch.Tensor, "new_empty", new)
