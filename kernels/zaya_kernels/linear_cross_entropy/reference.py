"""Readable loss over whole logits, any precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.linear_cross_entropy.op.linear_cross_entropy_and_z`."""
    work = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(work) @ weight.to(work).t()
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum")
    if not z_loss:
        return loss, torch.zeros_like(loss)
    z = z_loss * logits.logsumexp(dim=-1)[labels != ignore].square().sum()
    return loss + z, z.detach()
