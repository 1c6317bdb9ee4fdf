"""Every shipped kernel has a bug planted in it alone that is caught in every change's tests and not
only at night."""

from __future__ import annotations

import pytest
from zaya_kernels.workshop.budgets import BUDGETS

from ..helpers.mutation import of_kernels, planted_often

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from . import test_planted_attention_bugs as attention
from . import test_planted_bugs as cca_and_norm
from . import test_planted_grouped_mlp_bugs as grouped_mlp
from . import test_planted_loss_bugs as loss
from . import test_planted_permute_bugs as permute
from . import test_planted_router_bugs as router
from . import test_triton_newton_schulz as newton_schulz

TESTS = (
    cca_and_norm.test_a_bug_in_cca_is_caught,
    cca_and_norm.test_a_bug_in_the_backward_of_cca_is_caught,
    cca_and_norm.test_a_bug_in_norm_residual_is_caught,
    attention.test_a_bug_in_attention_is_caught,
    router.test_a_bug_in_the_router_is_caught,
    loss.test_a_bug_in_the_loss_is_caught,
    permute.test_a_bug_is_caught,
    grouped_mlp.test_a_bug_is_caught,
    newton_schulz.test_a_bug_is_caught,
)


def test_every_kernel_has_a_planted_bug() -> None:
    assert set().union(*map(planted_often, TESTS)) == set(BUDGETS)


def test_a_kernel_without_one_or_at_night_alone_is_seen() -> None:
    @of_kernels({"first": ["often", "at night"], "without": []}, nightly=True)
    @pytest.mark.parametrize(
        ("kernel", "bug"), [pytest.param("late", "at night", marks=pytest.mark.nightly)]
    )
    def test(kernel: str, bug: str) -> None: ...

    assert planted_often(test) == {"first"}
