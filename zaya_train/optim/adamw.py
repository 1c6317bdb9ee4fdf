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
        self.first = [shard.state() for shard in self.shards]
        self.second = [shard.state() for shard in self.shards]
        self.steps = torch.zeros((), dtype=torch.int64)
        """Updates made; what a checkpoint holds."""
        self._members = {
            kind: [i for i, s in enumerate(self.shards) if decays[i] is kind and s.local.numel()]
            for kind in (True, False)
        }
        self._counts = self._counters()

    def step(self, learning_rate: float) -> None:
        """One update from the parameters' gradients."""
        self._counts.fill_(self.steps)
        counts = self._counts.unbind()
        for decays, members in self._members.items():
            if members:
                update(
                    [self.shards[i].local for i in members],
                    [self.shards[i].grad.to(torch.float32) for i in members],
                    ([self.first[i] for i in members], [self.second[i] for i in members]),
                    [counts[i] for i in members],
                    self.config,
                    learning_rate,
                    self.config.weight_decay if decays else 0.0,
                )
        self.steps += 1

    def _counters(self) -> Tensor:
        """Room for the counter that torch's fused kernel wants, and advances, per parameter."""
        device = self.shards[0].local.device if self.shards else None
        return torch.zeros(len(self.shards), device=device)


def update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: tuple[list[Tensor], list[Tensor]],
    steps: list[Tensor],
    config: AdamWConfig | BalancingConfig,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """AdamW in place; `steps` are the numbers of updates already made, fp32, advanced as well."""
    adamw(
        parameters,
        gradients,
        moments[0],
        moments[1],
        [],
        steps,
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
