"""Matrix products in C (native/gemm.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_kernels.native.library import TYPES, call, check, check_shape

if TYPE_CHECKING:
    from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out [m, n] = a [m, k] @ b [k, n], or added to it, outside autograd; returns `out`.

    a and b are of one type, fp32 or bf16, with any strides. Rows of `out` are contiguous; it is
    fp32, or bf16 like the operands and not added to. Sums are fp32.
    """
    sizes = a.shape[0], b.shape[1], a.shape[1]
    check_shape("product: right", b, (sizes[2], None))
    check_shape("product: out", out, sizes[:2])
    if out.stride(1) != 1 and sizes[1] > 1:
        raise ValueError(f"product: rows of out have stride {out.stride(1)}, expected 1")
    check("product", a, b)
    if out.dtype != torch.float32 and (add or out.dtype != a.dtype):
        raise ValueError(f"product: {a.dtype} to {out.dtype}" + (" added" if add else ""))
    left, right = (*a.stride(), TYPES[a.dtype]), b.stride()
    call(
        "zaya_gemm", *sizes, a, *left[:2], b, *right, left[2],
        out, out.stride(0), TYPES[out.dtype], int(add), torch.get_num_threads(),
    )  # fmt: skip
    return out
