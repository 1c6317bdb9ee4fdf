"""Bytes of a model's parameters on rank 0: their shards, and what is gathered of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from zaya_train.model.shapes import parameter_shapes
from zaya_train.optim.table import assign

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zaya_train.config.derive import Layout
    from zaya_train.config.schema import ModelConfig
    from zaya_train.optim.table import Rule


@dataclass(frozen=True)
class Unit:
    """Elements of what FSDP gathers together: a layer, or the rest of the model."""

    local: int
    """On rank 0."""
    muon: int
    """Of them, Muon's."""
    padded: int
    """Gathered, rounded up to equal rows of all ranks."""
    whole: int
    """Of which this rank computes with."""
    largest: int
    """Of the largest parameter's local rows."""
    experts: int
    """Whole weights of the experts of this rank."""


@dataclass(frozen=True)
class Weights:
    """A model's units on one layout."""

    root: Unit
    layers: tuple[Unit, ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        return (self.root, *self.layers)

    @property
    def local(self) -> int:
        return sum(unit.local for unit in self.units)

    @property
    def muon(self) -> int:
        return sum(unit.muon for unit in self.units)

    @property
    def padded(self) -> int:
        return sum(unit.padded for unit in self.units)

    @property
    def whole(self) -> int:
        return sum(unit.whole for unit in self.units)


def weights_of(model: ModelConfig, degrees: Layout) -> Weights:
    """Of `model`, sharded over `degrees`."""
    return _weights(model, degrees.fsdp, degrees.expert)


@lru_cache(maxsize=256)
def _weights(model: ModelConfig, fsdp: int, expert: int) -> Weights:
    shapes = parameter_shapes(model)
    by_unit: dict[str, list[str]] = {}
    for name in shapes:
        words = name.split(".")
        by_unit.setdefault(words[1] if words[0] == "layers" else "", []).append(name)
    table = assign(shapes)
    units = {
        unit: _unit(((shapes[name], table[name]) for name in names), fsdp, expert)
        for unit, names in by_unit.items()
    }
    return Weights(units[""], tuple(units[str(i)] for i in range(model.num_layers)))


def _unit(parameters: Iterable[tuple[tuple[int, ...], Rule]], fsdp: int, expert: int) -> Unit:
    local = muon = padded = whole = largest = experts = 0
    for (first, *rest), rule in parameters:
        ranks, of_experts = fsdp, rule.what == "experts"
        if of_experts:
            first, ranks = first // expert, fsdp // expert
        row = math.prod(rest)
        rows = -(-first // ranks)
        local += rows * row
        muon += rows * row if rule.optimizer == "muon" else 0
        padded += rows * ranks * row
        whole += first * row
        largest = max(largest, rows * row)
        experts += first * row if of_experts else 0
    return Unit(local, muon, padded, whole, largest, experts)
