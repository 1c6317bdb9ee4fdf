"""Experts through Transformer Engine's `GroupedLinear`: what can be shown without it.

A stand-in keeps the module's documented contract (parameters weight0, weight1, ... [out, in], rows
and a list of splits in, rows out), so that layouts of weights and gradients, splits and
empty experts are proved here; the last test is of the library itself.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from zaya_kernels.grouped_mlp import op
from zaya_kernels.grouped_mlp import transformer_engine as host

from ..helpers.kernels import assert_close, assert_no_worse, run_pass
from ..helpers.mutation import mutated
from .test_grouped_mlp import COUNTS, call, inputs_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor


class GroupedLinear(nn.Module):
    """The documented contract of transformer_engine.pytorch.GroupedLinear."""

    made = 0

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        params_dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__()
        assert not bias
        GroupedLinear.made += 1
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{i}", nn.Parameter(weight))

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        """inp [R, in] -> [R, out]."""
        assert len(m_splits) == self.num_gemms and all(type(n) is int for n in m_splits)
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        return torch.cat(
            [linear(x, w) for x, w in zip(torch.split(inp, m_splits), weights, strict=True)]
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where `transformer_engine.pytorch` is imported, and as a back end on the CPU."""
    package, inner = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    inner.GroupedLinear = GroupedLinear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", inner)
    monkeypatch.setitem(op.BACKENDS, "transformer_engine", host.by_grouped_linear)
    host._module.cache_clear()
    yield
    host._module.cache_clear()


def check(counts: Sequence[int]) -> None:
    inputs = inputs_of(counts, hidden=7, width=5)
    exact = run_pass(lambda b, x: call(counts, b, x), "reference", inputs)
    found = run_pass(lambda b, x: call(counts, b, x), "transformer_engine", inputs)
    assert_close(found, exact, 1e-12)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", COUNTS)
def test_stacks_are_the_modules_weights(name: str) -> None:
    """Outputs and all gradients, experts without rows and over-full ones, no row at all."""
    check(COUNTS[name])


@pytest.mark.usefixtures("stand_in")
def test_a_module_is_made_once_per_shape_and_holds_no_storage() -> None:
    before = GroupedLinear.made
    for _ in range(3):
        check([3, 1])
    assert GroupedLinear.made == before + 2
    module = host._module(2, (10, 7), torch.float64)
    assert GroupedLinear.made == before + 2
    assert all(weight.is_meta for weight in module.parameters())
    assert [tuple(weight.shape) for weight in module.parameters()] == [(10, 7)] * 2


@pytest.mark.usefixtures("stand_in")
def test_the_pre_activation_is_kept_and_the_incoming_gradient_left_alone() -> None:
    hidden = inputs_of([3])["rows"].float()[:, :6].clone().requires_grad_(True)
    out: Tensor = host._SwiGLU.apply(hidden)  # type: ignore[no-untyped-call]
    grad = torch.ones_like(out)
    torch.autograd.backward(out, grad)
    assert torch.equal(grad, torch.ones_like(grad)) and hidden.grad is not None


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels\.grouped_mlp: transformer_engine needs a GPU"):
        call([3], "transformer_engine", inputs_of([3]))


BUGS = {
    "weights of another order": ("enumerate(stack.unbind())", "enumerate(stack.flip(0).unbind())"),
    "one expert's weights for all": ("f\"weight{i}\": weight", "f\"weight{i}\": stack[0]"),
    "shape turned": ("num_gemms, shape[1], shape[0]", "num_gemms, shape[0], shape[1]"),
    "splits turned": ("splits = counts.tolist()", "splits = counts.tolist()[::-1]"),
    "activation left out": ("_SwiGLU.apply(_product(rows, splits, gate_up))",
                            "_product(rows, splits, gate_up)[:, : down.shape[2]]"),
    "gradient of the activation": ("grad.clone())[1]", "grad.clone() * 2)[1]"),
}  # fmt: skip


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = mutated(host, *BUGS[bug], tmp_path)
    monkeypatch.setitem(op.BACKENDS, "transformer_engine", planted.by_grouped_linear)
    with pytest.raises(AssertionError):
        check([4, 1, 3])
        module = planted._module(2, (10, 7), torch.float64)
        assert tuple(module.weight0.shape) == (10, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["even", "empty_middle", "one_takes_all"])
def test_the_library_itself(name: str) -> None:
    if find_spec("transformer_engine") is None:
        pytest.skip("transformer_engine is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    counts = [16 * count for count in COUNTS[name]]
    inputs = {key: x.to("cuda", torch.bfloat16) for key, x in inputs_of(counts, 64, 32).items()}
    assert_no_worse(lambda b, x: call(counts, b, x), inputs, "transformer_engine", slack=1.5)
