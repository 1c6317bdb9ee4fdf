"""Experts by `torch.nn.functional.grouped_mm`: five products, all experts in each.

Where an expert's rows end is read on the device, so the host need not know the counts; torch reads
them itself where it has no kernel for the device and falls back on a loop (on a CPU always).

torch writes what it takes: sums are fp32, but a weight's gradient in bf16 is rounded to bf16 once
per call, as with `eager`; adding it to fp32 sums unrounded needs `triton`.

Legend: R rows, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from zaya_kernels.grouped_mlp.swiglu import swiglu, swiglu_backward

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT_BYTES = 16
"""Of every row of every operand."""


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(rows.device, torch.int32, non_blocking=True)
        hidden = grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
        out = grouped_mm(swiglu(hidden), down.transpose(1, 2), offs=ends)
        ctx.save_for_backward(rows, hidden, gate_up, down, ends)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        rows, hidden, gate_up, down, ends = ctx.saved_tensors
        grad = grad.contiguous()
        activated, grad_hidden = swiglu_backward(hidden, grouped_mm(grad, down, offs=ends))
        return (
            grouped_mm(grad_hidden, gate_up, offs=ends),
            None,
            grouped_mm(grad_hidden.t(), rows, offs=ends),
            grouped_mm(grad.t(), activated, offs=ends),
        )


def grouped_mlp_grouped_mm(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `zaya_kernels.grouped_mlp.op.grouped_mlp`.

    Raises:
        ValueError: fp64, or widths of which a row is no multiple of 16 bytes.
    """
    if rows.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"kernels.grouped_mlp: grouped_mm takes fp32 and bf16, not {rows.dtype}")
    step = ALIGNMENT_BYTES // rows.dtype.itemsize
    _, hidden, width = down.shape
    if hidden % step or width % step:
        raise ValueError(
            f"kernels.grouped_mlp: grouped_mm takes widths that are multiples of {step} in "
            f"{rows.dtype}, not {hidden} and {width}"
        )
    return _GroupedMLP.apply(rows.contiguous(), counts, gate_up.contiguous(), down.contiguous())
