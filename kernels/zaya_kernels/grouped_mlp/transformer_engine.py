"""Experts by Transformer Engine's `GroupedLinear`: both products, SwiGLU of torch's in between.

That module owns one parameter `weight0`, `weight1`, ... [out, in] per expert and takes the rows of
each as a list of numbers, so the host waits for the counts once a layer. Ours are stacks [E, out,
in]: their slices stand in for the module's parameters during a call (torch.func.functional_call),
without a copy, and autograd stacks the slices' gradients again.

In fp8 by per-tensor current scaling (docs/decisions/0019-fp8-by-current-scaling.md): every scale is
made from the numbers it scales, so a module remembers nothing between calls, all layers may share
one, and a checkpoint holds nothing of it. Products in fp8 want multiples of 16 in every dimension,
an expert's rows too (its weight's gradient is summed over them): rows of zeros are put behind each
expert's own, which change neither its largest magnitude nor any sum.

Legend: R rows, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from zaya_kernels.grouped_mlp.eager import grouped_mlp_eager
from zaya_kernels.grouped_mlp.swiglu import SwiGLU
from zaya_train.config.kernel_rules import FP8_MULTIPLE

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn


@cache
def _module(num_gemms: int, shape: tuple[int, int], dtype: torch.dtype, fp8: bool) -> nn.Module:
    """A `GroupedLinear` for weights [out, in], without storage: every call brings its own. One for
    each precision, since the module keeps what its last one was."""
    from transformer_engine.pytorch import GroupedLinear

    made: nn.Module = GroupedLinear(
        num_gemms, shape[1], shape[0], bias=False, params_dtype=dtype, device="meta"
    )
    return made


@cache
def _recipe() -> Any:
    """Rows and weights in e4m3, incoming gradients in e5m2, all sums in fp32: without the split
    accumulator NVIDIA's forward products keep 14 bits of theirs."""
    from transformer_engine.common.recipe import Float8CurrentScaling, Format, MMParams

    return Float8CurrentScaling(
        fp8_format=Format.HYBRID, fp8_gemm_fprop=MMParams(use_split_accumulator=True)
    )


def _precision(fp8: bool) -> AbstractContextManager[None]:
    if not fp8:
        return nullcontext()
    from transformer_engine.pytorch import fp8_autocast

    within: AbstractContextManager[None] = fp8_autocast(enabled=True, fp8_recipe=_recipe())
    return within


def _product(rows: Tensor, splits: list[int], stack: Tensor, fp8: bool) -> Tensor:
    """rows [R, in], `splits` of them per expert, stack [E, out, in] -> [R, out]."""
    module = _module(len(splits), (stack.shape[1], stack.shape[2]), stack.dtype, fp8)
    weights = {f"weight{i}": weight for i, weight in enumerate(stack.unbind())}
    with _precision(fp8):
        out: Tensor = functional_call(module, weights, (rows, splits))
    return out


def _places(splits: list[int], padded: list[int], device: torch.device) -> Tensor:
    """[R] int64: where each row stands among the padded ones."""
    sizes, wide = torch.tensor(splits), torch.tensor(padded)
    shift = (wide.cumsum(0) - wide) - (sizes.cumsum(0) - sizes)
    own = torch.arange(sum(splits)) + shift.repeat_interleave(sizes)
    return own.to(device, non_blocking=True)


def _check(rows: Tensor) -> None:
    if rows.device.type != "cuda":
        raise ValueError(
            f"kernels.grouped_mlp: transformer_engine needs a GPU, the tensors are on {rows.device}"
        )


def grouped_mlp_transformer_engine(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """See `zaya_kernels.grouped_mlp.op.grouped_mlp`. Without a row there is no product, and the
    eager form makes the gradients of zeros."""
    _check(rows)
    return by_grouped_linear(rows, counts, gate_up, down)


def grouped_mlp_transformer_engine_fp8(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The same with products in fp8.

    Raises:
        ValueError: a width is no multiple of 16.
    """
    _check(rows)
    return by_grouped_linear_fp8(rows, counts, gate_up, down)


def by_grouped_linear(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`grouped_mlp_transformer_engine` wherever the installed module runs."""
    splits = counts.tolist()
    if not rows.shape[0]:
        return grouped_mlp_eager(rows, counts, gate_up, down)
    return _experts(rows, splits, gate_up, down, fp8=False)


def by_grouped_linear_fp8(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`grouped_mlp_transformer_engine_fp8` wherever the installed module runs."""
    _, hidden, width = down.shape
    if hidden % FP8_MULTIPLE or width % FP8_MULTIPLE:
        raise ValueError(
            f"kernels.grouped_mlp: transformer_engine takes widths that are multiples of "
            f"{FP8_MULTIPLE} in fp8, not {hidden} and {width}"
        )
    splits = counts.tolist()
    if not rows.shape[0]:
        return grouped_mlp_eager(rows, counts, gate_up, down)
    padded = [-(-count // FP8_MULTIPLE) * FP8_MULTIPLE for count in splits]
    if padded == splits:
        return _experts(rows, splits, gate_up, down, fp8=True)
    places = _places(splits, padded, rows.device)
    # No place twice, so the additions in the gradient of index_select have no order.
    spread = rows.new_zeros(sum(padded), hidden).index_copy(0, places, rows)
    return _experts(spread, padded, gate_up, down, fp8=True).index_select(0, places)


def _experts(
    rows: Tensor, splits: list[int], gate_up: Tensor, down: Tensor, *, fp8: bool
) -> Tensor:
    return _product(SwiGLU.apply(_product(rows, splits, gate_up, fp8)), splits, down, fp8)
