"""Experts by Transformer Engine's `GroupedLinear`: both products, SwiGLU of torch's in between.

That module owns one parameter `weight0`, `weight1`, ... [out, in] per expert and takes the rows of
each as a list of numbers, so the host waits for the counts once a layer. Ours are stacks [E, out,
in]: their slices stand in for the module's parameters during a call (torch.func.functional_call),
without a copy, and autograd stacks the slices' gradients again.

Legend: R rows, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from zaya_kernels.grouped_mlp.eager import grouped_mlp_eager
from zaya_kernels.grouped_mlp.swiglu import swiglu, swiglu_backward

if TYPE_CHECKING:
    from torch import Tensor, nn


class _SwiGLU(torch.autograd.Function):
    """Keeps the pre-activation alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return swiglu(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        return swiglu_backward(hidden, grad.clone())[1]


@cache
def _module(num_gemms: int, shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    """A `GroupedLinear` for weights [out, in], without storage: every call brings its own."""
    from transformer_engine.pytorch import GroupedLinear

    made: nn.Module = GroupedLinear(
        num_gemms, shape[1], shape[0], bias=False, params_dtype=dtype, device="meta"
    )
    return made


def _product(rows: Tensor, splits: list[int], stack: Tensor) -> Tensor:
    """rows [R, in], `splits` of them per expert, stack [E, out, in] -> [R, out]."""
    module = _module(len(splits), (stack.shape[1], stack.shape[2]), stack.dtype)
    weights = {f"weight{i}": weight for i, weight in enumerate(stack.unbind())}
    out: Tensor = functional_call(module, weights, (rows, splits))
    return out


def grouped_mlp_transformer_engine(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """See `zaya_kernels.grouped_mlp.op.grouped_mlp`. Without a row there is no product, and the
    eager form makes the gradients of zeros."""
    if rows.device.type != "cuda":
        raise ValueError(
            f"kernels.grouped_mlp: transformer_engine needs a GPU, the tensors are on {rows.device}"
        )
    return by_grouped_linear(rows, counts, gate_up, down)


def by_grouped_linear(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same wherever the installed module runs."""
    splits = counts.tolist()
    if not rows.shape[0]:
        return grouped_mlp_eager(rows, counts, gate_up, down)
    return _product(_SwiGLU.apply(_product(rows, splits, gate_up)), splits, down)
