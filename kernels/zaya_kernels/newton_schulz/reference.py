"""Readable Newton-Schulz iteration, one matrix at a time, any precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.newton_schulz.types import Polynomials


def newton_schulz_reference(
    matrices: Tensor, polynomials: Polynomials, dtype: torch.dtype
) -> Tensor:
    """See `zaya_kernels.newton_schulz.op.newton_schulz`."""
    results = []
    for matrix in matrices:
        x = matrix.to(dtype)
        x = x / x.norm().clamp_min(1e-7)
        for a, b, c in polynomials:
            gram = x @ x.t()
            x = a * x + (b * gram + c * gram @ gram) @ x
        results.append(x)
    out = torch.stack(results)
    return out.to(torch.promote_types(dtype, torch.float32))
