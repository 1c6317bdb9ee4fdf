"""LM head and cross-entropy in one operation that never holds the whole logits.

Legend: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_kernels.backends import pick
from zaya_kernels.linear_cross_entropy.eager import linear_cross_entropy_eager
from zaya_kernels.linear_cross_entropy.native import linear_cross_entropy_native
from zaya_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from zaya_train.config.labels import IGNORE_LABEL

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def _triton(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    from zaya_kernels.linear_cross_entropy.triton import linear_cross_entropy_triton

    return linear_cross_entropy_triton(hidden, weight, labels, ignore, z_loss)


BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "eager": linear_cross_entropy_eager,
    "native": linear_cross_entropy_native,
    "reference": linear_cross_entropy_reference,
    "triton": _triton,
}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, backend: str, z_loss: float = 0.0
) -> Tensor:
    """Summed negative log-likelihood, a scalar in fp32 or higher.

    hidden [T, D], weight [V, D], labels [T] int64 with IGNORE_LABEL where nothing is supervised.
    Products, softmax and accumulation are in fp32 or higher (2605.05365, II-A: fp32 LM head).
    `z_loss` times the squared logarithm of each supervised token's softmax sum is added (arXiv
    2204.02311, 5): it keeps logits from drifting.
    """
    return linear_cross_entropy_and_z(hidden, weight, labels, backend, z_loss)[0]


def linear_cross_entropy_and_z(
    hidden: Tensor, weight: Tensor, labels: Tensor, backend: str, z_loss: float
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and what of it is the z-loss: a scalar without gradients."""
    run = pick("linear_cross_entropy", BACKENDS, backend)
    return run(hidden, weight, labels, IGNORE_LABEL, z_loss)
