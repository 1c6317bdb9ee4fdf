"""All of a run's optimizers behind one object: Muon, AdamW and the balancing controller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_train.optim.adamw import AdamW
from zaya_train.optim.balancing import BalancingController
from zaya_train.optim.muon import Muon
from zaya_train.optim.shards import Shard
from zaya_train.optim.table import assign

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from torch.nn import Parameter

    from zaya_train.config.schema import OptimConfig
    from zaya_train.optim.exchange import Groups
    from zaya_train.optim.table import MatrixView


class Optimizer:
    """Updates every parameter exactly once per step. Construction and steps are collective.

    Args:
        parameters: full name -> parameter, sharded or plain.
        biases: the routers' balancing biases in layer order.
        num_experts: experts per layer.
        groups: ranks the parameters are sharded over, and those with the same shard.
        backend: Newton-Schulz back end.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        biases: Iterable[Tensor],
        num_experts: int,
        config: OptimConfig,
        groups: Groups,
        backend: str,
    ) -> None:
        self.table = assign(parameters)
        self.shards = {name: Shard.of(name, p) for name, p in parameters.items()}
        muon = [s for s in self.shards.values() if self.table[s.name].optimizer == "muon"]
        adam = [s for s in self.shards.values() if self.table[s.name].optimizer == "adamw"]
        self.muon = Muon(muon, self._views(muon), self._decays(muon), config.muon, groups, backend)
        self.adamw = AdamW(adam, self._decays(adam), config.adamw)
        self.balancing = BalancingController(list(biases), num_experts, config.balancing)

    def _views(self, shards: Iterable[Shard]) -> list[MatrixView]:
        return [view for s in shards if (view := self.table[s.name].view)]

    def _decays(self, shards: Iterable[Shard]) -> list[bool]:
        return [self.table[s.name].decays for s in shards]

    @torch.no_grad()
    def step(self, muon_rate: float, adamw_rate: float, load: Tensor) -> None:
        """One update from gradients and the step's global load [L, C]."""
        self.muon.step(muon_rate)
        self.adamw.step(adamw_rate)
        self.balancing.step(load)

    def tensors(self) -> dict[str, Tensor]:
        """State by stable name, as DTensors where parameters are: independent of the mesh."""
        state: dict[str, Tensor] = {}
        for shard, momentum in zip(self.muon.shards, self.muon.momentum, strict=True):
            state[f"optim.muon.{shard.name}.momentum"] = shard.as_full(momentum)
        moments = zip(self.adamw.shards, self.adamw.first, self.adamw.second, strict=True)
        for shard, first, second in moments:
            state[f"optim.adamw.{shard.name}.first"] = shard.as_full(first)
            state[f"optim.adamw.{shard.name}.second"] = shard.as_full(second)
        state["optim.adamw.steps"] = self.adamw.steps
        state["optim.balancing.first"] = self.balancing.first
        state["optim.balancing.second"] = self.balancing.second
        state["optim.balancing.steps"] = self.balancing.steps
        return state
