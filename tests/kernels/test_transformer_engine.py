"""Experts through Transformer Engine's `GroupedLinear`: what can be shown without it.

A stand-in keeps the module's documented contract (parameters weight0, weight1, ... [out, in], rows
and a list of splits in, rows out; fp8_autocast, its recipe and the sizes it takes), so that layouts
of weights and gradients, splits, padding and empty experts are proved here; the last tests are of
the library itself.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from zaya_kernels.grouped_mlp import fp8_emulated, op, swiglu
from zaya_kernels.grouped_mlp import transformer_engine as host

from ..helpers.kernels import assert_close, assert_no_worse, error, run_pass
from ..helpers.mutation import mutated
from .test_grouped_mlp import COUNTS, call, inputs_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
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
        if RECIPES:
            return self.in_fp8(inp, m_splits, weights)
        return torch.cat(
            [linear(x, w) for x, w in zip(torch.split(inp, m_splits), weights, strict=True)]
        )

    def in_fp8(self, inp: Tensor, m_splits: list[int], weights: list[Tensor]) -> Tensor:
        """2.4.0's utils.assert_dim_for_fp8_exec, and the 16 of its Fp8Padding; its arithmetic by
        per-tensor current scaling, which remembers nothing."""
        assert all(n % 16 == 0 for n in (inp.shape[1], weights[0].shape[0], *m_splits))
        recipe = RECIPES[-1]
        assert isinstance(recipe, Float8CurrentScaling) and recipe.fp8_format is Format.HYBRID
        out: Tensor = fp8_emulated._Linear.apply(  # type: ignore[no-untyped-call]
            inp, torch.stack(weights), m_splits, fp8_emulated.OCP
        )
        return out


class Format(Enum):
    """transformer_engine.common.recipe.Format."""

    E4M3 = 1
    HYBRID = 2


@dataclass(frozen=True)
class MMParams:
    """transformer_engine.common.recipe.MMParams."""

    use_split_accumulator: bool = True


@dataclass
class Float8CurrentScaling:
    """transformer_engine.common.recipe.Float8CurrentScaling, defaults included."""

    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = field(default_factory=lambda: MMParams(False))
    fp8_gemm_dgrad: MMParams = field(default_factory=MMParams)
    fp8_gemm_wgrad: MMParams = field(default_factory=MMParams)


RECIPES: list[Float8CurrentScaling] = []
"""Of the fp8_autocast that is entered, if any."""
USED: list[Float8CurrentScaling] = []


@contextmanager
def fp8_autocast(enabled: bool, fp8_recipe: Float8CurrentScaling) -> Iterator[None]:
    """transformer_engine.pytorch.fp8_autocast."""
    assert enabled
    RECIPES.append(fp8_recipe)
    USED.append(fp8_recipe)
    try:
        yield
    finally:
        RECIPES.pop()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where `transformer_engine.pytorch` is imported, and as a back end on the CPU."""
    package, inner = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    recipe = ModuleType("transformer_engine.common.recipe")
    vars(inner).update(GroupedLinear=GroupedLinear, fp8_autocast=fp8_autocast)
    vars(recipe).update(Float8CurrentScaling=Float8CurrentScaling, Format=Format, MMParams=MMParams)
    common = ModuleType("transformer_engine.common")
    monkeypatch.setitem(sys.modules, "transformer_engine.common", common)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipe)
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", inner)
    monkeypatch.setitem(op.BACKENDS, "transformer_engine", host.by_grouped_linear)
    monkeypatch.setitem(op.FP8_BACKENDS, "transformer_engine", host.by_grouped_linear_fp8)
    USED.clear()
    for cached in (host._module, host._recipe):
        cached.cache_clear()
    yield
    for cached in (host._module, host._recipe):
        cached.cache_clear()


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
    module = host._module(2, (10, 7), torch.float64, False)
    assert GroupedLinear.made == before + 2
    assert all(weight.is_meta for weight in module.parameters())
    assert [tuple(weight.shape) for weight in module.parameters()] == [(10, 7)] * 2


@pytest.mark.usefixtures("stand_in")
def test_the_pre_activation_is_kept_and_the_incoming_gradient_left_alone() -> None:
    hidden = inputs_of([3])["rows"].float()[:, :6].clone().requires_grad_(True)
    out: Tensor = swiglu.SwiGLU.apply(hidden)  # type: ignore[no-untyped-call]
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
    "activation left out": ("SwiGLU.apply(_product(rows, splits, gate_up, fp8))",
                            "_product(rows, splits, gate_up, fp8)[:, : down.shape[2]]"),
}  # fmt: skip


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = mutated(host, *BUGS[bug], tmp_path)
    monkeypatch.setitem(op.BACKENDS, "transformer_engine", planted.by_grouped_linear)
    with pytest.raises(AssertionError):
        check([4, 1, 3])
        module = planted._module(2, (10, 7), torch.float64, False)
        assert tuple(module.weight0.shape) == (10, 7)


@pytest.mark.usefixtures("stand_in")
def test_a_wrong_gradient_of_the_activation_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = mutated(swiglu, "grad.clone())[1]", "grad.clone() * 2)[1]", tmp_path)
    monkeypatch.setattr(host, "SwiGLU", planted.SwiGLU)
    with pytest.raises(AssertionError):
        check([4, 1, 3])


def fp8(counts: Sequence[int], backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
    sizes = torch.tensor(counts)
    return [op.grouped_mlp(x["rows"], sizes, x["gate_up"], x["down"], backend, fp8=True)]


def check_fp8(counts: Sequence[int]) -> None:
    """Rows of zeros behind every expert's change no bit, whatever the sums' order in between."""
    inputs = inputs_of(counts, hidden=32, width=16)
    plain = run_pass(lambda b, x: fp8(counts, b, x), "fp8_emulated", inputs)
    found = run_pass(lambda b, x: fp8(counts, b, x), "transformer_engine", inputs)
    assert_close(found, plain, 1e-12)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", COUNTS)
def test_in_fp8_experts_are_padded_to_whole_products(name: str) -> None:
    """Outputs and all gradients; the stand-in refuses sizes that are no multiples of 16."""
    check_fp8(COUNTS[name])


@pytest.mark.usefixtures("stand_in")
def test_in_fp8_rows_that_need_no_padding_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: Any) -> None:
        raise AssertionError("rows were moved")

    monkeypatch.setattr(host, "_places", moved)
    check_fp8([16, 0, 48])
    with pytest.raises(AssertionError, match="rows were moved"):
        check_fp8([16, 1, 48])


@pytest.mark.usefixtures("stand_in")
def test_in_fp8_the_recipe_scales_by_what_it_scales_and_sums_in_fp32() -> None:
    check_fp8([3, 1])
    # Both products, and none outside of the context.
    assert len(USED) == 2 and not RECIPES
    expected = Float8CurrentScaling(fp8_gemm_fprop=MMParams(True))
    assert all(recipe == expected for recipe in USED)
    before = len(USED)
    check([3, 1])
    assert len(USED) == before, "bf16 in an fp8 context"


@pytest.mark.usefixtures("stand_in")
def test_in_fp8_a_module_used_before_computes_as_a_new_one() -> None:
    """All layers share one; a checkpoint holds nothing of it."""
    check_fp8([3, 1])
    shapes = [(2, (32, 32), torch.float64), (2, (32, 16), torch.float64)]
    modules = [host._module(*shape, True) for shape in shapes]
    assert modules[0] is not host._module(*shapes[0], False)
    large = {name: 1e3 * x for name, x in inputs_of([3, 1], 32, 16).items()}
    run_pass(lambda b, x: fp8([3, 1], b, x), "transformer_engine", large)
    check_fp8([3, 1])
    assert [host._module(*shape, True) for shape in shapes] == modules
    assert not any(module.state_dict(keep_vars=True).keys() - {"weight0", "weight1"}
                   for module in modules)  # fmt: skip


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("hidden", "width"), [(24, 16), (16, 8)])
def test_in_fp8_odd_widths_are_refused(hidden: int, width: int) -> None:
    expected = f"widths that are multiples of 16 in fp8, not {hidden} and {width}"
    with pytest.raises(ValueError, match=expected):
        fp8([3], "transformer_engine", inputs_of([3], hidden, width))


def test_in_fp8_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels\.grouped_mlp: transformer_engine needs a GPU"):
        fp8([3], "transformer_engine", inputs_of([3], 16, 16))


FP8_BUGS = {
    "not padded": ("padded = [-(-count // FP8_MULTIPLE) * FP8_MULTIPLE for count in splits]",
                   "padded = splits"),
    "padded to half": ("-(-count // FP8_MULTIPLE) * FP8_MULTIPLE", "-(-count // 8) * 8"),
    "padding that is not zero": ("rows.new_zeros(sum(padded)", "rows.new_ones(sum(padded)"),
    "places of the rows": ("(wide.cumsum(0) - wide) - (sizes", "wide.cumsum(0) - (sizes"),
    "rows collected in another order": (".index_select(0, places)",
                                        ".index_select(0, places.flip(0))"),
    "rows left where they were": ("index_copy(0, places, rows)",
                                  "index_copy(0, torch.arange(len(places)), rows)"),
    "the default recipe": (", fp8_gemm_fprop=MMParams(use_split_accumulator=True)", ""),
    "another format": ("Format.HYBRID", "Format.E4M3"),
    "no fp8 at all": ("if not fp8:", "if True:"),
}  # fmt: skip


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("bug", FP8_BUGS)
def test_a_bug_in_fp8_is_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = mutated(host, *FP8_BUGS[bug], tmp_path)
    monkeypatch.setitem(op.FP8_BACKENDS, "transformer_engine", planted.by_grouped_linear_fp8)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_fp8([4, 1, 19])
        assert USED[0].fp8_gemm_fprop.use_split_accumulator


def skip_without_the_library() -> None:
    if find_spec("transformer_engine") is None:
        pytest.skip("transformer_engine is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["even", "empty_middle", "one_takes_all"])
def test_the_library_itself(name: str) -> None:
    skip_without_the_library()
    counts = [16 * count for count in COUNTS[name]]
    inputs = {key: x.to("cuda", torch.bfloat16) for key, x in inputs_of(counts, 64, 32).items()}
    assert_no_worse(lambda b, x: call(counts, b, x), inputs, "transformer_engine", slack=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", COUNTS)
def test_the_library_itself_in_fp8(name: str) -> None:
    """It and the emulation, in the formats of the device, differ by less than each from float64."""
    skip_without_the_library()
    counts, fnuz = (
        COUNTS[name],
        torch.version.hip is not None
        and "gfx94" in (torch.cuda.get_device_properties(0).gcnArchName),
    )
    inputs = {key: x.to("cuda", torch.bfloat16) for key, x in inputs_of(counts, 64, 32).items()}
    emulated = "fp8_emulated_fnuz" if fnuz else "fp8_emulated"
    found, expected = (
        run_pass(lambda b, x: fp8(counts, b, x), backend, inputs)
        for backend in ("transformer_engine", emulated)
    )
    assert error(found.outputs[0], expected.outputs[0]) < 2e-2
    for key, gradient in found.gradients.items():
        assert error(gradient, expected.gradients[key]) < 6e-2, key
