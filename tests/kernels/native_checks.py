"""What the suite compares of the back end in C, in few and quick forms, by name: one of them fails
when a bug of `test_planted_native_bugs` is planted."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels import products

from ..helpers.kernels import assert_no_worse
from ..helpers.permutation import inputs_of, there_and_back
from . import test_native as native
from . import test_native_norm_residual as norm
from . import test_native_router as router

if TYPE_CHECKING:
    from collections.abc import Callable

FP32, BF16 = torch.float32, torch.bfloat16
LOSS = (33, 33, 65, 0.1)


def check_products(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    for turned in ((0, 0), (1, 0), (0, 1), (1, 1)):
        native.test_products(sizes, turned, dtype)


def check_halves() -> None:
    for stream in ("float32", "bfloat16"):
        norm.test_either_half_is_as_exact_as_eager(stream, BF16)


def with_onednn(comparison: Callable[..., None], *sizes: object) -> None:
    """Eager by oneDNN, as the router's tests have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "SMALLEST_PRODUCT", 1)
        comparison(*sizes)


def check_moves() -> None:
    for name, skip in (("random", "identity"), ("skipped", "identity"), ("random", "zero")):
        inputs = inputs_of(name, FP32, hidden=22)
        move = partial(there_and_back, name, True, skip)
        assert_no_worse(move, inputs, "native")
        assert_no_worse(move, {"tokens": inputs["tokens"]}, "native")


def check_exact_probabilities() -> None:
    """Of tokens in bf16."""
    exact = {"probability": inputs_of("random", FP32)["probability"]}
    inputs = inputs_of("random", BF16, hidden=22) | exact
    assert_no_worse(partial(there_and_back, "random", True, "identity"), inputs, "native")


def check_experts(dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        native.test_experts_are_as_exact_as_eager("odd", (23, 37), dtype, patch)


CHECKS: dict[str, Callable[[], None]] = {
    "products": partial(check_products, (37, 45, 33), FP32),
    "products in bf16": partial(check_products, (37, 45, 33), BF16),
    "long products": partial(check_products, (100, 70, 514), FP32),
    "wide products": partial(check_products, (20, 600, 7), FP32),
    "long products in bf16": partial(check_products, (100, 70, 514), BF16),
    "products rounded once": native.test_products_in_bf16_are_rounded_once,
    "cca": partial(native.test_cca_in_chunks_equals_the_whole_row, (2, 2), (70, 0)),
    "cca of odd sizes": partial(native.test_cca_is_as_exact_as_eager, native.SHAPES[1], FP32),
    "attention": partial(native.test_attention_is_as_exact_as_torch, (8, 2), 64, FP32),
    "attention of odd sizes": partial(native.test_attention_is_as_exact_as_torch, (3, 3), 10, FP32),
    "attention of large scores": native.test_attention_of_scores_of_any_size,
    "attention behind keys": partial(
        native.test_attention_behind_keys, [(100, 180), (33, 34), (0, 33)], FP32
    ),
    "norm": partial(norm.test_fused_is_as_exact_as_eager, norm.SHAPES[3], FP32),
    "norm of odd sizes": partial(norm.test_fused_is_as_exact_as_eager, norm.SHAPES[1], BF16),
    "halves of the norm": check_halves,
    "router": partial(
        with_onednn, router.test_router_is_as_exact_as_eager, router.SIZES[3], False, FP32
    ),
    "router of odd sizes": partial(
        with_onednn, router.test_router_is_as_exact_as_eager, router.SIZES[2], False, BF16
    ),
    "choice": partial(router.test_choice_and_load_are_those_of_float64, FP32),
    "equal classes": router.test_of_equal_classes_the_first_is_chosen,
    "moves": check_moves,
    "exact probabilities": check_exact_probabilities,
    "loss": partial(native.test_loss_is_as_exact_as_eager, None, *LOSS, FP32),
    "loss in bf16": partial(native.test_loss_is_as_exact_as_eager, None, *LOSS, BF16),
    "loss of many classes": partial(
        native.test_loss_is_as_exact_as_eager, None, 70, 3, 2100, 0.1, FP32
    ),
    "large loss": native.test_loss_without_supervision_and_of_large_logits,
    "experts": partial(check_experts, FP32),
    "experts in bf16": partial(check_experts, BF16),
}
