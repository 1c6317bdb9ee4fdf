"""RMSNorm and residual scaling modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from zaya_kernels.norm_residual.op import (
    ResidualScales,
    residual,
    residual_norm,
    rms_norm,
    stream_norm,
)

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

    def beside(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The stream as it is and its norm, for a stream that is used again."""
        return stream_norm(stream, self.weight, self.eps, self.backend)


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
        return residual(stream, branch, self._scales(), self.backend)

    def before(self, norm: RMSNorm, stream: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` and `norm` of it: the new stream and the next block's input."""
        scales = self._scales()
        return residual_norm(stream, branch, scales, norm.weight, norm.eps, self.backend)

    def _scales(self) -> ResidualScales:
        return ResidualScales(
            self.stream_scale, self.stream_bias, self.branch_scale, self.branch_bias
        )
