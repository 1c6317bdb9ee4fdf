"""SwiGLU experts over rows sorted by expert.

Legend: R rows, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_kernels.backends import pick
from zaya_kernels.grouped_mlp.eager import grouped_mlp_eager
from zaya_kernels.grouped_mlp.reference import grouped_mlp_reference

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = {"eager": grouped_mlp_eager, "reference": grouped_mlp_reference}


def grouped_mlp(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, backend: str
) -> Tensor:
    """rows [R, D] sorted by expert, counts [E] int64 summing to R, gate_up [E, 2F, D] (gate first),
    down [E, D, F] -> [R, D]. Experts without rows are allowed; their gradients are zero."""
    return pick("grouped_mlp", BACKENDS, backend)(rows, counts, gate_up, down)
