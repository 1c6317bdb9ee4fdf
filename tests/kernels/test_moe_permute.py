"""Permutation by expert: every back end against the reference, Triton interpreted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from zaya_kernels.backends import named_in_profiles
from zaya_kernels.moe_permute.op import count_by_expert, gather, rest_of, scatter, sort_by_expert

from ..helpers.kernels import assert_backends_agree, assert_bitwise, assert_no_worse, random
from ..helpers.permutation import (
    EXPERTS,
    HIDDEN,
    TOKENS,
    choices,
    inputs_of,
    ordered,
    there_and_back,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

pytest.importorskip("triton", reason="the extra `triton` is not installed")
from zaya_kernels.moe_permute import triton as host
from zaya_kernels.workshop.interpreter import counting

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize("backend", ["eager", "native", "reference", "triton"])
@pytest.mark.parametrize("name", ["random", "long", "skipped", "none", "one", "first", "last"])
def test_sorted_stably_and_counted(name: str, backend: str) -> None:
    choice = choices(name)
    found = ordered(choice, backend)
    assert torch.equal(found.order, torch.argsort(choice, stable=True))
    assert torch.equal(found.counts, torch.bincount(choice, minlength=EXPERTS + 1))


@pytest.mark.parametrize("experts", [1, 40, host.MOST_EXPERTS])
def test_sorted_among_few_and_many_experts(experts: int) -> None:
    choice = torch.arange(90) * 7919 % (experts + 1)
    load = count_by_expert(choice, experts, "triton")
    assert torch.equal(load.counts, torch.bincount(choice, minlength=experts + 1))
    assert torch.equal(sort_by_expert(load).order, torch.argsort(choice, stable=True))


@pytest.mark.parametrize(
    ("name", "known", "skip"),
    [
        ("random", True, "identity"),
        ("random", True, "zero"),
        ("random", False, "identity"),
        ("random", False, "zero"),
        ("one", False, "identity"),
        ("skipped", True, "zero"),
        ("skipped", False, "identity"),
        ("none", True, "identity"),
        ("none", False, "zero"),
    ],
)
def test_rows_and_gradients(name: str, known: bool, skip: str) -> None:
    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return there_and_back(name, known, skip, backend, x)

    assert_backends_agree(run, inputs_of(name, torch.float64))
    for backend in ("native", "triton"):
        for dtype in (torch.float32, torch.bfloat16):
            assert_no_worse(run, inputs_of(name, dtype), backend)
        exact = {"probability": inputs_of(name, torch.float32)["probability"]}
        assert_no_worse(run, inputs_of(name, torch.bfloat16) | exact, backend)
        if skip == "identity":
            assert_bitwise(run, inputs_of(name, torch.bfloat16), backend)
            alone = inputs_of(name, torch.float32)
            del alone["probability"]
            assert_no_worse(run, alone, backend)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_probabilities_may_be_more_exact_than_rows(backend: str) -> None:
    """fp32, as the router gives them; so is their gradient."""
    tokens = random(TOKENS, HIDDEN, seed=1).bfloat16()
    probability = random(TOKENS, seed=2).float().requires_grad_(True)
    order = ordered(choices("one"), backend, known=True)
    out = scatter(tokens, order, None, probability)
    assert torch.equal(out, (tokens.float() * probability.unsqueeze(1)).bfloat16())
    (grad,) = torch.autograd.grad(out, probability, torch.ones_like(out))
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, tokens.float().sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_rows_alone_or_rest_alone_have_a_gradient(backend: str) -> None:
    order = ordered(choices("random"), backend, known=True)
    for chosen in (0, 1):
        tokens = random(TOKENS, HIDDEN, seed=1).float().requires_grad_(True)
        out = gather(tokens, order)[chosen]
        (grad,) = torch.autograd.grad(out, tokens, torch.ones_like(out))
        routed = (choices("random") < EXPERTS).float().unsqueeze(1).expand_as(tokens)
        assert torch.equal(grad, routed if chosen == 0 else torch.ones_like(grad))


def test_what_the_kernels_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels\.moe_permute: triton sorts by 511 experts"):
        count_by_expert(choices("random"), 512, "triton")
    order = ordered(choices("random"), "triton")
    rows = random(TOKENS, HIDDEN, seed=1)
    with pytest.raises(ValueError, match=r"kernels\.moe_permute: triton takes fp32 and bf16"):
        gather(rows, order)
    with pytest.raises(ValueError, match=r"kernels\.moe_permute: triton takes one type"):
        scatter(rows.float(), order, rows.bfloat16(), None)
    with pytest.raises(ValueError, match=r"kernels\.moe_permute: no back end 'fast'"):
        count_by_expert(choices("random"), EXPERTS, "fast")


@pytest.mark.parametrize("name", ["random", "one"])
def test_traffic_is_what_the_kernels_move(name: str) -> None:
    choice = choices(name)
    tokens = random(TOKENS, HIDDEN, seed=1).bfloat16().requires_grad_(True)
    probability = random(TOKENS, seed=2).float().requires_grad_(True)
    with counting() as found:
        order = ordered(choice, "triton")
        rows, left = gather(tokens, order)
        out = scatter(rows, order, rest_of(left, order), probability)
        torch.autograd.backward(out, torch.ones_like(out))
    assert [launch.kernel for launch in found] == [
        "permute_count", "permute_sum", "permute_place", "permute_gather", "permute_scatter",
        "permute_scatter_backward", "permute_scatter",
    ]  # fmt: skip
    kept = int((choice < EXPERTS).sum())
    programs = TOKENS - kept  # Those of places without a row read their token and end.
    moved, _ = host.traffic(TOKENS, kept, HIDDEN, EXPERTS)
    assert sum(launch.distinct_bytes for launch in found) == moved + 8 * programs


@pytest.mark.parametrize("kept", [0, 16_384, 32_768])
def test_traffic_is_near_the_fewest_possible(kept: int) -> None:
    moved, fewest = host.traffic(32_768, kept, 2048, 16)
    assert fewest < moved <= 1.01 * fewest


def test_every_part_is_a_range_around_its_work_in_profiles() -> None:
    tokens = random(TOKENS, HIDDEN, seed=1)
    with named_in_profiles(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        order = ordered(choices("random"), "eager")
        rows, left = gather(tokens, order)
        scatter(rows, order, rest_of(left, order), None)
    ranges = [event for event in recorded.events() if event.name == "zaya::moe_permute"]
    assert len(ranges) == 5
    assert all(event.cpu_children for event in ranges)
