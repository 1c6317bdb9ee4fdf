"""What a rank's memory consists of: the names that forecasts and rehearsals share."""

from __future__ import annotations

WEIGHTS = "master weights"
STATE = "optimizer state"
GATHERED = "gathered weights"
FULL_GRADIENTS = "full gradients"
GRADIENTS = "gradients"
ACTIVATIONS = "activations"
AGAIN = "recomputed activations"
BACKWARD = "backward pass"
LOSS = "loss and LM head"
BUFFERS = "collective buffers"
STEP = "optimizer step"

COMPONENTS = (
    WEIGHTS, STATE, GATHERED, FULL_GRADIENTS, GRADIENTS, ACTIVATIONS, AGAIN, BACKWARD, LOSS,
    BUFFERS, STEP,
)  # fmt: skip
"""In the order of tables."""
RESERVE = 0.10
"""Share of a device's memory that a peak must leave free for what nobody counts: RCCL, hipBLASLt,
the allocator's rounding (10 to 15 % are usual)."""
GB, MB = 10**9, 10**6


def in_gb(count: float) -> str:
    """Bytes in GB for a message: to a tenth, and what is below one not as 0.0."""
    return f"{count / GB:.1f}" if count >= GB else f"{count / GB:.3g}"
