"""What the back end in C does at the ends of its range, and what it refuses to touch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy

from ..helpers.kernels import random, run_pass
from . import test_grouped_mlp

if TYPE_CHECKING:
    from torch import Tensor

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@TYPES
def test_gates_far_from_zero_are_closed_or_open(dtype: torch.dtype) -> None:
    """Where e^-x leaves fp32; a vector of columns and a rest."""
    gates = torch.tensor([-300.0, -200, -100, -89.5, -88.5, -80, -20, 20, 80, 89.5, 100, 200, 300])
    up = torch.cat([torch.ones(17, 1), torch.full((17, 1), 0.5)])
    inputs: dict[str, Tensor] = {
        "rows": gates[:, None].to(dtype),
        "gate_up": up[None].to(dtype),
        "down": torch.full((1, 1, 17), 0.25).to(dtype),
    }
    found, usual = (
        run_pass(lambda name, x: test_grouped_mlp.call([len(gates)], name, x), name, inputs)
        for name in ("native", "eager")
    )
    steps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.outputs, usual.outputs, rtol=steps, atol=1e-30)
    torch.testing.assert_close(found.gradients, usual.gradients, rtol=steps, atol=1e-30)


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_that_are_no_class_are_refused(label: int) -> None:
    hidden, weight = random(3, 4, seed=1).float(), random(7, 4, seed=2).float()
    with pytest.raises(IndexError, match=f"label {label} is none of 7 classes"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, label, 6]), "native")


def test_labels_of_any_integer_type_are_taken() -> None:
    hidden, weight = random(3, 4, seed=1).float(), random(7, 4, seed=2).float()
    labels = torch.tensor([0, -100, 6])
    expected = linear_cross_entropy(hidden, weight, labels, "native")
    assert linear_cross_entropy(hidden, weight, labels.int(), "native") == expected
    with pytest.raises(
        ValueError, match=r"linear_cross_entropy: shape \[7, 4\], expected \[any, 5"
    ):
        linear_cross_entropy(random(3, 5, seed=1).float(), weight, labels, "native")
    with pytest.raises(ValueError, match=r"linear_cross_entropy: shape \[3\], expected \[2\]"):
        linear_cross_entropy(hidden[:2], weight, labels, "native")
