"""The back end in C reads what it was given: strides, no bit past the end, in any order."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy

from ..helpers.kernels import random, run_pass
from ..helpers.models import packed
from ..helpers.permutation import inputs_of as permutation_inputs
from ..helpers.permutation import there_and_back
from . import (
    test_attention,
    test_cca,
    test_grouped_mlp,
    test_linear_cross_entropy,
    test_native_router,
    test_router,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    Operation = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def operations() -> dict[str, tuple[Operation, dict[str, Tensor]]]:
    shape, plan = test_cca.Shape(), packed([[5, 7], [12]], 12).attention
    context = test_cca.context_of(shape, test_cca.DOCUMENTS)
    counts = [20, 0, 17, 3]
    labels = test_linear_cross_entropy.labels_of(40, 30, 2100)
    return {
        "cca": (lambda x: test_cca.call("native", x, context), test_cca.inputs_of(shape)),
        "attention": (
            lambda x: test_attention.call("native", x, plan),
            test_attention.inputs_of(2, 12, 12, (4, 2)),
        ),
        "grouped_mlp": (
            lambda x: test_grouped_mlp.call(counts, "native", x),
            test_grouped_mlp.inputs_of(counts, 40, 70),
        ),
        "linear_cross_entropy": (
            lambda x: test_linear_cross_entropy.call(labels, "native", x),
            test_linear_cross_entropy.inputs_of(40, 2100),
        ),
        "moe_permute": (
            lambda x: there_and_back("random", True, "identity", "native", x),
            permutation_inputs("random", torch.float64),
        ),
        # More tokens than a block has, and parts of the tokens for each thread.
        "router": (
            lambda x: test_native_router.pass_of(test_router.context_of((2, 601)), "native", x),
            test_router.inputs_of((2, 601), torch.float64, False, 20, 24),
        ),
    }


def strided(x: Tensor) -> Tensor:
    """The same numbers, the first dimension innermost."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@TYPES
@pytest.mark.parametrize("name", operations())
def test_strides_change_no_bit(name: str, dtype: torch.dtype) -> None:
    """Of the inputs, and of gradients that autograd expanded."""
    run, inputs = operations()[name]

    def passed(*, plain: bool) -> list[Tensor]:
        given = {k: x.to(dtype) if plain else strided(x.to(dtype)) for k, x in inputs.items()}
        leaves = [x.requires_grad_(True) for x in given.values()]
        outputs = list(run(given))
        one = [random(*out.shape[-1:], seed=9, dtype=out.dtype).expand_as(out) for out in outputs]
        grads = [x.contiguous() for x in one] if plain else one
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    assert same(passed(plain=False), passed(plain=True))


@TYPES
@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("name", operations())
def test_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    run, inputs = operations()[name]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        passed = run_pass(
            lambda _, x: run(x), "native", {k: x.to(dtype) for k, x in inputs.items()}
        )
        found.append([*passed.outputs, *passed.gradients.values()])
    assert same(found[1], found[0])
    assert same(found[2], found[0])


def test_small_probabilities_are_not_zero() -> None:
    """Down to where fp32 ends; vectors of classes and a rest."""
    scores = -torch.arange(0.0, 84.0, 2.0)
    hidden, weight = torch.ones(1, 1), scores[:, None].clone().requires_grad_(True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]), "native")
    (found,) = torch.autograd.grad(loss, weight)
    expected = scores.double().softmax(0).float()
    torch.testing.assert_close(found[1:, 0], expected[1:], rtol=2e-6, atol=0)


GUARDED = """
import torch
from tests.helpers.guard_pages import guarded
from zaya_kernels.native.product import multiply
for dtype in (torch.float32, torch.bfloat16):
    for m in (1, 4, 7, 8, 9, 12, 13, 20):
        for n, k in ((1, 2), (33, 6), (64, 35)):
            a, b = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)
            out, same = guarded(torch.empty(m, n)), guarded(torch.empty(m, n, dtype=dtype))
            for left in (guarded(a), guarded(a.t().contiguous()).t()):
                for right in (guarded(b), guarded(b.t().contiguous()).t()):
                    assert (multiply(left, right, out) == k).all()
                    assert (multiply(left, right, same) == k).all()
print("whole")
"""


def test_products_touch_nothing_behind_their_operands() -> None:
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


GUARDED_OPERATIONS = """
import torch
from tests.helpers.guard_pages import guard_allocations, guarded
from tests.kernels import test_native_norm_residual as norm
from tests.kernels.test_native_memory import operations
torch.set_num_threads(1)
cases = operations()
for shape in ((2, 3, 7), (1, 40, 48)):
    inputs = norm.inputs_of(shape, torch.float32)
    cases[f"norm_residual {shape}"] = (lambda x: norm.fused("native", x), inputs)
guard_allocations()
for name, (run, inputs) in cases.items():
    for dtype in (torch.float32, torch.bfloat16):
        given = {k: guarded(x.to(dtype)).requires_grad_(True) for k, x in inputs.items()}
        outputs = list(run(given))
        found = torch.autograd.grad(sum(out.sum() for out in outputs), list(given.values()))
        assert all(x.isfinite().all() for x in [*outputs, *found]), name
        print(name, end=" ", flush=True)
"""


def test_operations_touch_nothing_behind_their_tensors() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GUARDED_OPERATIONS], capture_output=True, text=True
    )
    names = [*operations(), "norm_residual (2, 3, 7)", "norm_residual (1, 40, 48)"]
    expected = "".join(f"{name} " * 2 for name in names)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
