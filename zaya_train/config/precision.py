"""Number formats of a training step; part of the schema (config.schema)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    compute_dtype: Literal["fp32", "bf16"] = "bf16"
    """Gathered parameters and activations. Master weights and the residual stream are fp32."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradient reduction."""
    expert_dtype: Literal["compute_dtype", "fp8"] = "compute_dtype"
    """Operands of the experts' products. fp8: eight bits, scaled per expert from what is multiplied
    (docs/kernels.md); master weights, sums and all else are as without. Needs
    kernels.grouped_mlp=transformer_engine on a GPU with fp8, or an emulation. `zaya parity`
    compares the two curves."""
