"""Expert MLP in C, an expert at a time and at its own number of rows (native/experts.c).

Saved for backward: the rows and the pre-activation; the activation is recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from zaya_kernels.native.library import TYPES, call, check, check_shape

if TYPE_CHECKING:
    from torch import Tensor


def _sizes(down: Tensor) -> tuple[int, ...]:
    """`Sizes` of experts.c."""
    return *down.shape, TYPES[down.dtype], torch.get_num_threads()


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows, gate_up, down = (x.contiguous() for x in (rows, gate_up, down))
        hidden = rows.new_empty(rows.shape[0], 2 * down.shape[2])
        out = torch.empty_like(rows)
        call("zaya_experts", _sizes(down), counts, rows, gate_up, down, hidden, out)
        ctx.save_for_backward(rows, hidden, gate_up, down, counts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        rows, hidden, gate_up, down, counts = ctx.saved_tensors
        grad = grad.contiguous()
        made = [torch.empty_like(x) for x in (rows, gate_up, down)]
        tensors = (rows, hidden, gate_up, down, grad, *made)
        call("zaya_experts_backward", _sizes(down), counts, tensors)
        return made[0], None, made[1], made[2]


def grouped_mlp_native(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `zaya_kernels.grouped_mlp.op.grouped_mlp`."""
    check("grouped_mlp", rows, gate_up, down)
    experts, hidden, width = down.shape
    check_shape("grouped_mlp: rows", rows, (None, hidden))
    check_shape("grouped_mlp: gate_up", gate_up, (experts, 2 * width, hidden))
    check_shape("grouped_mlp: counts", counts, (experts,))
    # The library trusts them with its memory.
    if not isinstance(counts, FakeTensor):
        total = int(counts.sum())
        if bool((counts < 0).any()):
            raise ValueError(f"experts' counts are {counts.tolist()}, expected none below 0")
        if total != rows.shape[0]:
            raise ValueError(f"experts' counts sum to {total}, of {rows.shape[0]} rows")
    return _GroupedMLP.apply(rows, counts.long().contiguous(), gate_up, down)
