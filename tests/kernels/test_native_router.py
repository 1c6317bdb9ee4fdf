"""The router in C against float64 and against eager torch, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from zaya_kernels import products

from ..helpers.kernels import assert_no_worse, run_pass
from . import test_router
from .test_router import CLASSES, call, context_of, inputs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from zaya_kernels.router.op import RouterContext

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FIRST = pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
# Tokens, width, hidden: one row; less than a vector; several blocks in a part, odd ends of all.
SIZES = [((1, 1), 70, 12), ((2, 9), 20, 24), ((2, 300), 7, 33), ((3, 401), 48, 36)]


@pytest.fixture(autouse=True)
def sums_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager by oneDNN, which sums as C does; MKL has another order for small matrices."""
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", 1)


def wide(x: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The earlier state as the model hands it on, in fp32 or more."""
    if "previous" not in x:
        return x
    return {**x, "previous": x["previous"].to(torch.promote_types(x["x"].dtype, torch.float32))}


def pass_of(context: RouterContext, backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    routed = call(backend, wide(x), context)
    return [routed.probability, routed.state]


def decided(context: RouterContext, x: Mapping[str, Tensor]) -> RouterContext:
    """With the choice that float64 makes: a rounding must not send two back ends apart."""
    routed = call("reference", {name: value.double() for name, value in x.items()}, context)
    return replace(context, choice=routed.choice, load=routed.load)


@TYPES
@FIRST
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_router_is_as_exact_as_eager(
    sizes: tuple[tuple[int, int], int, int], first: bool, dtype: torch.dtype
) -> None:
    shape, width, hidden = sizes
    inputs = inputs_of(shape, dtype, first, width, hidden)
    context = decided(context_of(shape), inputs)
    assert_no_worse(lambda b, x: pass_of(context, b, x), inputs, "native")


@TYPES
def test_far_activations_are_closed_or_open(dtype: torch.dtype) -> None:
    """Pre-activations in both tails, where the density is zero. The few that are not have sums
    short enough for chance."""
    inputs = inputs_of((3, 401), dtype, False, 48, 36)
    for name in ("fc1_bias", "fc2_bias"):
        inputs[name] = torch.linspace(-30, 30, 48).to(dtype)
    # Else the softmax is one-sided and rounding is most of its gradient.
    inputs["out"] *= 0.01
    context = decided(context_of((3, 401)), inputs)
    assert_no_worse(lambda b, x: pass_of(context, b, x), inputs, "native", slack=1.5)


@TYPES
def test_choice_and_load_are_those_of_float64(dtype: torch.dtype) -> None:
    """The bias decides for some."""
    context = context_of((3, 401))
    inputs = inputs_of((3, 401), dtype, False, 48, 36)
    expected = call("reference", {name: x.double() for name, x in inputs.items()}, context)
    found = call("native", wide(inputs), context)
    unbiased = replace(context, balancing=torch.zeros(CLASSES))
    assert torch.equal(found.choice, expected.choice)
    assert torch.equal(found.load, expected.load) and found.load.dtype == torch.float32
    assert not torch.equal(found.choice, call("native", wide(inputs), unbiased).choice)
    assert found.state.dtype == found.probability.dtype == torch.float32


@pytest.mark.parametrize("classes", [1, 16, 17, 40])
def test_any_number_of_classes(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_router, "CLASSES", classes)
    inputs = inputs_of((3, 401), torch.float32, False, 70, 36)
    context = decided(context_of((3, 401)), inputs)
    # Sums over tokens that nearly cancel: either back end may be the luckier one.
    assert_no_worse(lambda b, x: pass_of(context, b, x), inputs, "native", slack=2)
    free = call("native", inputs, replace(context, choice=None, load=None))
    assert context.choice is not None
    assert torch.equal(free.choice, context.choice)


def test_of_equal_classes_the_first_is_chosen() -> None:
    inputs, context = inputs_of((1, 6), torch.float32, True), context_of((1, 6))
    inputs["out"] = torch.zeros_like(inputs["out"])
    level = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    routed = call("native", inputs, replace(context, balancing=level))
    assert set(routed.choice.flatten().tolist()) == {1}


def test_scores_of_any_size_make_probabilities() -> None:
    """Exponentials overflow unless each row's largest score is found, wherever it stands. Rounding
    of scores of hundreds is most of the errors, by chance in either back end."""
    inputs = inputs_of((3, 401), torch.float32, True, 48, 36)
    inputs["out"] *= 300
    context = decided(context_of((3, 401)), inputs)
    assert_no_worse(lambda b, x: pass_of(context, b, x), inputs, "native", slack=2.5)


def test_a_row_of_nan_takes_a_class_and_spoils_no_other() -> None:
    inputs, context = inputs_of((1, 20), torch.float32, True), context_of((1, 20))
    clean = call("native", inputs, context)
    inputs["x"][0, 3] = float("nan")
    found = call("native", inputs, context)
    assert int(found.choice[0, 3]) == int(call("eager", inputs, context).choice[0, 3])
    assert bool(found.probability[0, 3].isnan())
    others = torch.arange(20) != 3
    assert torch.equal(found.probability[0, others], clean.probability[0, others])
    assert torch.equal(found.choice[0, others], clean.choice[0, others])


def test_a_given_choice_is_kept() -> None:
    inputs, context = inputs_of((1, 6), torch.float32, False), context_of((1, 6))
    choice, load = torch.tensor([[0, 1, 2, 3, 4, 0]]), torch.full((CLASSES,), 9.0)
    routed = call("native", inputs, replace(context, choice=choice, load=load))
    assert torch.equal(routed.choice, choice) and torch.equal(routed.load, load)
    assert not routed.choice.requires_grad
    # As eager: a choice without its load is made anew.
    free = call("native", inputs, context)
    again = call("native", inputs, replace(context, choice=(free.choice + 1) % CLASSES))
    assert torch.equal(again.choice, free.choice) and torch.equal(again.load, free.load)


@pytest.mark.parametrize("used", [0, 1])
def test_one_unused_output_has_no_part_in_the_gradient(used: int) -> None:
    inputs = inputs_of((2, 30), torch.bfloat16, False)
    context = decided(context_of((2, 30)), inputs)
    reached = {"x", "previous", "down", "down_bias", "depth_scale"}
    rest = {name: x for name, x in inputs.items() if used == 1 and name not in reached}
    leaves = {name: x for name, x in inputs.items() if name not in rest}

    def one(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        same = {name: value.to(x["x"].dtype) for name, value in rest.items()}
        return [pass_of(context, backend, {**x, **same})[used]]

    assert_no_worse(one, leaves, "native")


def test_an_earlier_state_without_a_scale_or_the_reverse_is_not_used() -> None:
    inputs, context = inputs_of((1, 6), torch.float32, False), context_of((1, 6))
    plain = {name: x for name, x in inputs.items() if name not in ("previous", "depth_scale")}
    expected = call("native", plain, context)
    for name in ("previous", "depth_scale"):
        leaf = inputs[name].clone().requires_grad_(True)
        found = call("native", {**plain, name: leaf}, context)
        assert torch.equal(found.state, expected.state)
        assert not found.state.requires_grad


def test_no_tokens_are_no_error() -> None:
    context = context_of((2, 0))
    none = run_pass(
        lambda b, x: pass_of(context, b, x), "native", inputs_of((2, 0), torch.float32, False)
    )
    assert none.outputs[1].shape == (2, 0, 8)
    assert all(float(g.abs().sum()) == 0.0 for g in none.gradients.values())
    assert float(call("native", inputs_of((2, 0), torch.float32, False), context).load.sum()) == 0


def test_the_state_leaves_as_no_view() -> None:
    routed = call("native", inputs_of((1, 6), torch.float32, True), context_of((1, 6)))
    assert not routed.state._is_view()


def test_what_the_router_cannot_read_is_refused() -> None:
    inputs, context = inputs_of((2, 9), torch.float32, False), context_of((2, 9))
    for name in ("down", "down_bias", "depth_scale", "norm", "fc1", "fc1_bias", "fc2", "fc2_bias"):
        with pytest.raises(ValueError, match=r"router: \w+: shape .* expected"):
            call("native", inputs | {name: inputs[name][:-1]}, context)
    for name, told in (("x", "down"), ("out", "out"), ("fc1", "fc1"), ("previous", "previous")):
        with pytest.raises(ValueError, match=f"router: {told}: shape"):
            call("native", inputs | {name: inputs[name][..., 1:]}, context)
    with pytest.raises(ValueError, match="router: previous: shape"):
        call("native", inputs | {"previous": inputs["previous"][:1]}, context)
    with pytest.raises(ValueError, match="router: balancing: shape"):
        call("native", inputs, replace(context, balancing=context.balancing[1:]))
    with pytest.raises(ValueError, match="router: valid: shape"):
        call("native", inputs, replace(context, valid=context.valid[:1]))
    with pytest.raises(ValueError, match=r"kernels\.router: native takes one type"):
        call("native", inputs | {"fc1": inputs["fc1"].bfloat16()}, context)
    with pytest.raises(ValueError, match=r"kernels\.router: native takes .* float64"):
        call("native", inputs | {"previous": inputs["previous"].double()}, context)


@pytest.mark.parametrize("wrong", [-1, CLASSES])
def test_choices_of_no_class_are_refused(wrong: int) -> None:
    inputs, context = inputs_of((1, 3), torch.float32, True), context_of((1, 3))
    choice, load = torch.tensor([[0, wrong, 1]]), torch.zeros(CLASSES)
    with pytest.raises(IndexError, match=f"choice of .*{wrong}.* none of {CLASSES} classes"):
        call("native", inputs, replace(context, choice=choice, load=load))
    with pytest.raises(ValueError, match="router: choice: shape"):
        call("native", inputs, replace(context, choice=choice[:, :2], load=load))


def test_choices_of_any_integer_type_are_taken() -> None:
    inputs, context = inputs_of((1, 3), torch.float32, True), context_of((1, 3))
    choice, load = torch.tensor([[4, 0, 1]]), torch.zeros(CLASSES)
    long, short = (
        call("native", inputs, replace(context, choice=choice.to(kind), load=load)).probability
        for kind in (torch.int64, torch.int32)
    )
    assert torch.equal(long, short)


def test_rehearsals_count_memory_without_computing() -> None:
    with FakeTensorMode():
        made = {name: x.requires_grad_(True) for name, x in fakes().items()}
        context = context_of((2, 9))
        routed = call("native", made, context)
        leaves = list(made.values())
        gradients = torch.autograd.grad(routed.probability.sum() + routed.state.sum(), leaves)
    assert [g.shape for g in gradients] == [x.shape for x in leaves]
    assert (routed.choice.shape, routed.load.shape) == ((2, 9), (CLASSES,))


def fakes() -> dict[str, Tensor]:
    return {
        name: torch.zeros(x.shape) for name, x in inputs_of((2, 9), torch.float32, False).items()
    }


GUARDED = """
import torch
from tests.helpers.guard_pages import guard_allocations, guarded
from tests.kernels.test_router import call, context_of, inputs_of
torch.set_num_threads(1)
guard_allocations()
for dtype in (torch.float32, torch.bfloat16):
    for tokens, width, hidden in ((1, 7, 5), (9, 20, 24), (300, 33, 17)):
        made = inputs_of((1, tokens), dtype, False, width, hidden)
        if dtype == torch.bfloat16:
            made["previous"] = made["previous"].float()
        made = {name: guarded(x).requires_grad_(True) for name, x in made.items()}
        routed = call("native", made, context_of((1, tokens)))
        (routed.probability.sum() + routed.state.sum()).backward()
        assert all(x.grad.isfinite().all() for x in made.values())
print("whole")
"""


def test_the_router_touches_nothing_behind_its_tensors() -> None:
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr
