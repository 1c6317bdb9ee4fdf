"""Counting without a wait for the device, and what the model refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zaya_kernels.counts import count_classes

from tests.helpers.models import TINY, packed, random_model, random_tokens
from zaya_train.model.interfaces import Surroundings
from zaya_train.model.zaya import ZayaModel

BATCH, SEQUENCE = 2, 12


def test_counts_are_bincounts() -> None:
    choice = torch.tensor([[3, 0, 3], [1, 4, 3]])
    counted = torch.tensor([[True, True, False], [True, False, True]])
    assert (
        count_classes(choice, 6).tolist() == torch.bincount(choice.flatten(), minlength=6).tolist()
    )
    assert count_classes(choice, 6, counted).tolist() == [1, 1, 0, 2, 0, 0]
    assert count_classes(choice[:0], 2).tolist() == [0, 0]


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations whose result's size depends on data: a GPU's host waits for those."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        masks = name == "aten::index.Tensor" and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if name in {"aten::bincount", "aten::unique_dim", "aten::_unique2"} or masks:
            self.seen[name] = self.seen.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_routing_waits_for_no_size() -> None:
    model = random_model(TINY)
    tokens = random_tokens(TINY, BATCH, SEQUENCE)
    waits = Waits()
    with waits:
        model.logits(tokens, packed([[SEQUENCE - 3]] * BATCH, SEQUENCE))
    assert waits.seen == {}


class Part:
    """A ContextExchange that is not WholeRows."""

    def halo(self, x: Any, rows: int) -> None:
        return None

    def gather(self, *xs: Any) -> Any:
        return xs


def test_logits_of_a_part_of_a_row_need_its_layout() -> None:
    model = ZayaModel(TINY, Surroundings(exchange=Part()))
    with pytest.raises(ValueError, match="ranks that share rows need a layout"):
        model.logits(random_tokens(TINY, BATCH, SEQUENCE))
