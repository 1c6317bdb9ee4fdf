"""RMSNorm and residual scaling modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from zaya_kernels.norm_residual.op import ResidualScales, residual, rms_norm

if TYPE_CHECKING:
    from torch import Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32, returned in the weight's dtype."""

    def __init__(self, size: int, eps: float, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape."""
        return rms_norm(x, self.weight, self.eps, self.backend)


class ResidualScaling(nn.Module):
    """x <- (x + b_res) a_res + (block + b_out) a_out, fp32 stream (2605.05365, II-A3)."""

    def __init__(self, size: int, backend: str) -> None:
        super().__init__()
        self.stream_scale = nn.Parameter(torch.empty(size))
        self.stream_bias = nn.Parameter(torch.empty(size))
        self.branch_scale = nn.Parameter(torch.empty(size))
        self.branch_bias = nn.Parameter(torch.empty(size))
        self.backend = backend

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        """stream and branch [B, S, D] -> stream [B, S, D]."""
        scales = ResidualScales(
            self.stream_scale, self.stream_bias, self.branch_scale, self.branch_bias
        )
        return residual(stream, branch, scales, self.backend)
