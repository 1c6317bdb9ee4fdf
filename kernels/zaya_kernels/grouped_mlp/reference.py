"""Readable expert MLP, one expert at a time, any precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, silu

if TYPE_CHECKING:
    from torch import Tensor


def grouped_mlp_reference(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `zaya_kernels.grouped_mlp.op.grouped_mlp`."""
    outputs = []
    for expert, chunk in enumerate(rows.split(counts.tolist())):
        gate, up = linear(chunk, gate_up[expert]).chunk(2, dim=-1)
        outputs.append(linear(silu(gate) * up, down[expert]))
    return torch.cat(outputs)
