"""The arithmetic of fp8 experts in torch's plain operations: slow, and the same everywhere.

Per-tensor current scaling, as Transformer Engine's `Float8CurrentScaling` in the hybrid format
(docs/decisions/0019-fp8-by-current-scaling.md): before every product each operand, an expert's rows
or its weights, is multiplied by the largest number of the format over its own largest magnitude and
rounded to eight bits; rows and weights to e4m3, incoming gradients to e5m2. Products of such
numbers are exact in fp32, where they are summed; the sum is divided by both scales and rounded to
the rows' type. Scales are made anew for every product from its own operands: nothing is remembered.

Legend: R rows, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from zaya_kernels.grouped_mlp.eager import spans
from zaya_kernels.grouped_mlp.swiglu import SwiGLU

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Formats:
    """Eight-bit types of the hybrid format: more precision forward, more range backward."""

    forward: torch.dtype
    """Rows and weights: three bits of mantissa."""
    backward: torch.dtype
    """Incoming gradients: two."""


OCP = Formats(torch.float8_e4m3fn, torch.float8_e5m2)
"""gfx950 and NVIDIA: largest 448 and 57,344."""
FNUZ = Formats(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""gfx942, the MI300X: largest 240 and 57,344."""


class Scaled(NamedTuple):
    """A tensor in eight bits: `values` * `inverse` is what it stands for."""

    values: Tensor
    inverse: Tensor
    """[] fp32."""


def scaled(x: Tensor, dtype: torch.dtype) -> Scaled:
    """`x`, rounded to `dtype` after its largest magnitude was brought to the format's largest.

    The scale is 1 for zeros, the largest of fp32 where the quotient is larger. A number that is not
    finite becomes NaN and makes the scale 1: torch's casts to e4m3fn saturate, and a gradient that
    overflowed has to be seen.
    """
    largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    # A number divided by a tensor would be multiplied by the tensor's reciprocal: rounded twice.
    scale = torch.full_like(largest, torch.finfo(dtype).max) / largest
    scale = scale.clamp_max(torch.finfo(torch.float32).max)
    usable = (largest > 0) & largest.isfinite()
    scale = torch.where(usable, scale, torch.ones_like(scale))
    wide = x.float()
    wide = torch.where(wide.isfinite(), wide * scale, float("nan"))
    return Scaled(wide.to(dtype), 1 / scale)


def _product(left: Scaled, right: Scaled, like: Tensor) -> Tensor:
    """[m, k] times [k, n], in fp32 (fp64 where rows are), as `like`'s type."""
    wide = torch.promote_types(like.dtype, torch.float32)
    total = left.values.to(wide) @ right.values.to(wide)
    return (total * (left.inverse * right.inverse)).to(like.dtype)


class _Linear(torch.autograd.Function):
    """rows [R, k], stack [E, n, k] -> [R, n]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: Tensor, sizes: list[int], types: Formats) -> Tensor:
        out = rows.new_empty(rows.shape[0], stack.shape[1])
        for expert, span in spans(sizes):
            weight = scaled(stack[expert], types.forward)
            turned = Scaled(weight.values.t(), weight.inverse)
            out[span] = _product(scaled(rows[span], types.forward), turned, rows)
        ctx.save_for_backward(rows, stack)
        ctx.sizes, ctx.types = sizes, types
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, stack = ctx.saved_tensors
        grad_rows, grad_stack = torch.empty_like(rows), torch.zeros_like(stack)
        for expert, span in spans(ctx.sizes):
            # Forward's own eight bits again: the same numbers give the same scales.
            weight = scaled(stack[expert], ctx.types.forward)
            taken = scaled(rows[span], ctx.types.forward)
            incoming = scaled(grad[span], ctx.types.backward)
            turned = Scaled(incoming.values.t(), incoming.inverse)
            grad_rows[span] = _product(incoming, weight, rows)
            grad_stack[expert] = _product(turned, taken, stack)
        return grad_rows, grad_stack, None, None


def _experts(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, types: Formats) -> Tensor:
    sizes = counts.tolist()
    hidden = _Linear.apply(rows, gate_up, sizes, types)
    return _Linear.apply(SwiGLU.apply(hidden), down, sizes, types)


def grouped_mlp_fp8_emulated(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `zaya_kernels.grouped_mlp.op.grouped_mlp`; in the formats of gfx950 and NVIDIA."""
    return _experts(rows, counts, gate_up, down, OCP)


def grouped_mlp_fp8_emulated_fnuz(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The same in the formats of gfx942."""
    return _experts(rows, counts, gate_up, down, FNUZ)
