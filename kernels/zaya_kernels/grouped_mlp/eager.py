"""Expert MLP as one autograd node that writes every expert's result in place.

Autograd over per-expert slices would allocate a full-size zero gradient for each slice. Saved for
backward: the rows and the pre-activation; the activation is recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.grouped_mlp.swiglu import swiglu, swiglu_backward
from zaya_kernels.products import by_onednn, product

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_WINDOW_STEP = 16
"""Row counts are rounded up to this, or to a sixteenth of the next power of two."""


def spans(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for experts that have any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _window(span: slice, total: int) -> slice:
    """`span` widened into its neighbours' rows to one of few sizes, within [0, total).

    oneDNN compiles a kernel for every new size; experts' counts differ in every step.
    """
    count = span.stop - span.start
    step = max(_WINDOW_STEP, (1 << (count - 1).bit_length()) // 16)
    width = min(total, -(-count // step) * step)
    start = min(span.start, total - width)
    return slice(start, start + width)


def _rows_times(rows: Tensor, span: slice, matrix: Tensor, out: Tensor) -> None:
    """out[span] = rows[span] @ matrix; rows [R, k], matrix [k, n], out [R, n]."""
    if not by_onednn(rows[span], matrix.shape[1]):
        torch.mm(rows[span], matrix, out=out[span])
        return
    window = _window(span, rows.shape[0])
    first = span.start - window.start
    out[span] = product(rows[window], matrix)[first : first + span.stop - span.start]


def _outer(grad: Tensor, rows: Tensor, span: slice, out: Tensor) -> None:
    """out = grad[span].T @ rows[span]; grad [R, n], rows [R, k], out [n, k]."""
    if not by_onednn(grad[span].t(), rows.shape[1]):
        torch.mm(grad[span].t(), rows[span], out=out)
        return
    window = _window(span, rows.shape[0])
    first = span.start - window.start
    alone = grad.new_zeros(window.stop - window.start, grad.shape[1])
    alone[first : first + span.stop - span.start] = grad[span]
    out.copy_(product(alone.t(), rows[window]))


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        sizes = counts.tolist()
        hidden = rows.new_empty(rows.shape[0], gate_up.shape[1])
        out = torch.empty_like(rows)
        for expert, span in spans(sizes):
            _rows_times(rows, span, gate_up[expert].t(), hidden)
        activated = swiglu(hidden)
        for expert, span in spans(sizes):
            _rows_times(activated, span, down[expert].t(), out)
        ctx.save_for_backward(rows, hidden, gate_up, down)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        rows, hidden, gate_up, down = ctx.saved_tensors
        grad = grad.contiguous()
        grad_activated = hidden.new_empty(hidden.shape[0], down.shape[2])
        for expert, span in spans(ctx.sizes):
            _rows_times(grad, span, down[expert], grad_activated)
        activated, grad_hidden = swiglu_backward(hidden, grad_activated)
        grad_rows, grad_gate_up, grad_down = (torch.empty_like(x) for x in (rows, gate_up, down))
        for expert, size in enumerate(ctx.sizes):
            if not size:
                grad_gate_up[expert].zero_()
                grad_down[expert].zero_()
        for expert, span in spans(ctx.sizes):
            _outer(grad, activated, span, grad_down[expert])
            _outer(grad_hidden, rows, span, grad_gate_up[expert])
            _rows_times(grad_hidden, span, gate_up[expert], grad_rows)
        return grad_rows, None, grad_gate_up, grad_down


def grouped_mlp_eager(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `zaya_kernels.grouped_mlp.op.grouped_mlp`."""
    return _GroupedMLP.apply(rows, counts, gate_up, down)
