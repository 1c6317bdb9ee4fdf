"""LM head and cross-entropy in one operation that never holds the whole logits.

Legend: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_kernels.backends import pick
from zaya_kernels.linear_cross_entropy.eager import linear_cross_entropy_eager
from zaya_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from zaya_train.config.labels import IGNORE_LABEL

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = {"eager": linear_cross_entropy_eager, "reference": linear_cross_entropy_reference}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str) -> Tensor:
    """Summed negative log-likelihood, a scalar in fp32 or higher.

    hidden [T, D], weight [V, D], labels [T] int64 with IGNORE_LABEL where nothing is supervised.
    Products, softmax and accumulation are in fp32 or higher (2605.05365, II-A: fp32 LM head).
    """
    run = pick("linear_cross_entropy", BACKENDS, backend)
    return run(hidden, weight, labels, IGNORE_LABEL)
