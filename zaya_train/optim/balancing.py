"""The controller of the routers' balancing biases (2605.05365, II-A2).

The bias of expert e in layer l gets the gradient p_le - 1/E, with p_le the share of the global
batch's tokens routed to e; AdamW applies it. An overloaded expert's bias falls, an idle one's
rises. The skip class's bias rests, or is steered towards a share of its own; the experts then
share the rest.

Legend: L layers, C router classes, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_train.optim.adamw import update

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zaya_train.config.schema import BalancingConfig


class BalancingController:
    """Steps once per optimizer step, never in evaluation; the same on every rank."""

    def __init__(self, biases: Sequence[Tensor], num_experts: int, config: BalancingConfig) -> None:
        self.config = config
        self.num_experts = num_experts
        self.biases = list(biases)
        size = (len(self.biases), self.biases[0].shape[0])
        self.first = torch.zeros(size, device=self.biases[0].device)
        self.second = torch.zeros(size, device=self.biases[0].device)
        self.steps = torch.zeros((), dtype=torch.int64)

    def step(self, load: Tensor) -> None:
        """load [L, C]: token counts over all ranks and micro-batches of the step."""
        share = load / load.sum(dim=1, keepdim=True).clamp_min(1)
        skipped = self.config.skip_target
        gradient = share - (1.0 - (skipped or 0.0)) / self.num_experts
        # Not 1/E for a class without an expert: that would leave 1 in E + 1 tokens without one.
        skip_share = share[:, self.num_experts :]
        gradient[:, self.num_experts :] = 0.0 if skipped is None else skip_share - skipped
        stacked = torch.stack(self.biases)
        moments = ([self.first], [self.second])
        count = [self.steps.to(self.first.device, torch.float32, copy=True)]
        rate = self.config.learning_rate
        update([stacked], [gradient], moments, count, self.config, rate, 0.0)
        self.steps += 1
        for bias, value in zip(self.biases, stacked, strict=True):
            bias.copy_(value)
