"""Readable residual scaling and RMSNorm, any precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def residual_reference(
    stream: Tensor,
    branch: Tensor,
    stream_scale: Tensor,
    stream_bias: Tensor,
    branch_scale: Tensor,
    branch_bias: Tensor,
) -> Tensor:
    """See `zaya_kernels.norm_residual.op.residual`."""
    work = torch.promote_types(stream.dtype, torch.float32)
    kept = (stream.to(work) + stream_bias.to(work)) * stream_scale.to(work)
    added = (branch.to(work) + branch_bias.to(work)) * branch_scale.to(work)
    return kept + added


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `zaya_kernels.norm_residual.op.rms_norm`."""
    work = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(work)
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight.to(work)).to(weight.dtype)
