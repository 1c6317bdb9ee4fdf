"""Expert MLP as one autograd node that writes every expert's result in place.

Autograd over per-expert slices would allocate a full-size zero gradient for each slice. Saved for
backward: the rows and the pre-activation; the activation is recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def _spans(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for experts that have any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        sizes = counts.tolist()
        width = down.shape[2]
        hidden = rows.new_empty(rows.shape[0], 2 * width)
        out = torch.empty_like(rows)
        for expert, span in _spans(sizes):
            torch.mm(rows[span], gate_up[expert].t(), out=hidden[span])
        activated = torch.nn.functional.silu(hidden[:, :width]).mul_(hidden[:, width:])
        for expert, span in _spans(sizes):
            torch.mm(activated[span], down[expert].t(), out=out[span])
        ctx.save_for_backward(rows, hidden, gate_up, down)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        rows, hidden, gate_up, down = ctx.saved_tensors
        width = down.shape[2]
        gate, up = hidden[:, :width], hidden[:, width:]
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad = grad.contiguous()
        grad_activated = torch.empty_like(silu)
        for expert, span in _spans(ctx.sizes):
            torch.mm(grad[span], down[expert], out=grad_activated[span])
        grad_hidden = torch.empty_like(hidden)
        torch.mul(grad_activated, silu, out=grad_hidden[:, width:])
        # d silu(g) / dg = s + silu(g) (1 - s) with s = sigmoid(g).
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        torch.mul(grad_activated.mul_(up), slope, out=grad_hidden[:, :width])
        activated = silu.mul_(up)
        empty = len(ctx.sizes) > sum(1 for size in ctx.sizes if size)
        make = torch.zeros_like if empty else torch.empty_like
        grad_rows, grad_gate_up, grad_down = torch.empty_like(rows), make(gate_up), make(down)
        for expert, span in _spans(ctx.sizes):
            torch.mm(grad[span].t(), activated[span], out=grad_down[expert])
            torch.mm(grad_hidden[span].t(), rows[span], out=grad_gate_up[expert])
            torch.mm(grad_hidden[span], gate_up[expert], out=grad_rows[span])
        return grad_rows, None, grad_gate_up, grad_down


def grouped_mlp_eager(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `zaya_kernels.grouped_mlp.op.grouped_mlp`."""
    return _GroupedMLP.apply(rows, counts, gate_up, down)
