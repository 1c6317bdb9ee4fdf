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
