"""The configuration's names of floating-point types."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Name in a configuration or on a command line -> torch dtype."""
