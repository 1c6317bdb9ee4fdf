"""Tensors that end where nothing may be touched."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(x: Tensor) -> Tensor:
    """A copy of x before a page that kills the process which reads or writes it."""
    page = mmap.PAGESIZE
    used = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, used + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _LIBC.mprotect(ctypes.c_void_p(start + used), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    at = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=used - x.nbytes)
    return at.view(x.shape).copy_(x)
