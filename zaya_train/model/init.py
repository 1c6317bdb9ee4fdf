"""Initial values of a model trained from scratch.

| tensor | initial value |
|---|---|
| embedding (tied LM head) | N(0, init_std^2) |
| matrices into a block: q, k, v, gate_up, router | N(0, 1 / fan_in) |
| router's last matrix | N(0, init_std^2): nearly even probabilities, see below |
| matrices back into the stream: out_proj, experts' down | N(0, 1 / (2 L fan_in)), L layers |
| convolutions | N(0, 1 / fan_in), fan_in = taps, or d x taps |
| key temperature | 1 (zero, as in transformers' `zaya`, would silence the keys) |
| norm weights, residual, depth-averaging and embedding scales | 1 |
| all biases | 0 |
| balancing bias | 0; skip class -1 (2605.05365, II-A2) |

With a wider last router matrix the GELU layers' positive means become constant preferences between
experts, two or three of which then take all tokens for the first hundred steps (docs/lab-log.md).

Every tensor has its own generator, seeded from (seed, name): values depend neither on the order of
construction nor on the layout of ranks.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from zaya_train.model.zaya import ZayaModel

_ONES = ("scale", "temperature", "norm", "weight")
_RESIDUAL_OUTPUTS = ("out_proj", "down")


def initialise(
    model: ZayaModel, seed: int, write: Callable[[Tensor, Tensor], object] | None = None
) -> None:
    """Fill every parameter and buffer of `model`.

    `write(target, full)` stores a full tensor; sharded models pass one that keeps their slice.
    """
    write = write or (lambda target, full: target.copy_(full))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = _initial(name, parameter, model, seed)
            write(parameter, full)
        for name, buffer in model.named_buffers():
            if not name.endswith("balancing_bias"):
                raise KeyError(f"no initial value is defined for buffer {name}")
            buffer.zero_()
            if model.config.skip_class:
                buffer[-1] = -1.0


def _initial(name: str, parameter: Tensor, model: ZayaModel, seed: int) -> Tensor:
    """Full initial value of one parameter, on its device."""
    leaf = name.rsplit(".", 1)[-1]
    full = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    if leaf.endswith("bias"):
        return full.zero_()
    std = _std(leaf, name, parameter, model)
    if std is None:
        return full.fill_(1.0)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(
        int.from_bytes(digest[:8], "big") >> 1
    )
    return full.normal_(std=std, generator=generator)


def _std(leaf: str, name: str, parameter: Tensor, model: ZayaModel) -> float | None:
    """Standard deviation of a random tensor; None for tensors of ones."""
    if name == "embedding" or name.endswith("router.out"):
        return model.config.init_std
    if leaf.endswith(_ONES):
        return None
    std = 1.0 / math.sqrt(parameter.shape[-1])
    if leaf in _RESIDUAL_OUTPUTS and not name.endswith("router.down"):
        std /= math.sqrt(2 * model.config.num_layers)
    return std
