"""AdamW on local shards through torch's functional form.

Elementwise, so a rank's shard is all it needs; plain local tensors avoid a DTensor dispatch per
operation. Moments exist from the start, so that every rank's checkpoint has the same keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zaya_train.config.schema import AdamWConfig, BalancingConfig
    from zaya_train.optim.shards import Shard


class AdamW:
    """AdamW over the given shards; `decays[i]` says whether weight decay applies to shard i."""

    def __init__(
        self, shards: Sequence[Shard], decays: Sequence[bool], config: AdamWConfig
    ) -> None:
        self.config = config
        self.shards = list(shards)
        self.decays = list(decays)
        self.first = [shard.state() for shard in self.shards]
        self.second = [shard.state() for shard in self.shards]
        self.steps = torch.zeros((), dtype=torch.int64)

    def step(self, learning_rate: float) -> None:
        """One update from the parameters' gradients."""
        for decays in (True, False):
            members = [
                i
                for i, shard in enumerate(self.shards)
                if self.decays[i] is decays and shard.local.numel()
            ]
            if members:
                weight_decay = self.config.weight_decay if decays else 0.0
                self._update(members, learning_rate, weight_decay)
        self.steps += 1

    def _update(self, members: list[int], learning_rate: float, weight_decay: float) -> None:
        count = self.steps.to(torch.float32)
        update(
            [self.shards[i].local for i in members],
            [self.shards[i].grad.to(torch.float32) for i in members],
            ([self.first[i] for i in members], [self.second[i] for i in members]),
            count,
            self.config,
            learning_rate,
            weight_decay,
        )


def update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    steps: Tensor,
    config: AdamWConfig | BalancingConfig,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """AdamW in place; `steps` is the number of updates already made."""
    adamw(
        parameters,
        gradients,
        moments[0],
        moments[1],
        [],
        [steps.clone().to(p.device) for p in parameters],
        foreach=False,
        fused=True,
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=config.eps,
        maximize=False,
    )
