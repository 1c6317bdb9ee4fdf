"""131,075 tokens, rows so wide that the last three start at element 2**31: addresses are int64.

All rows but the last few are zeros in memory that is never touched; of a launch those programs run
that reach the last rows, and what they give is compared with the reference on these rows alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from zaya_kernels.attention.op import attention
from zaya_kernels.attention.segments import Segment, plan_attention
from zaya_kernels.cca.op import CCAContext, CCAWeights, Projections, cca
from zaya_kernels.grouped_mlp.op import grouped_mlp
from zaya_kernels.launch import CHIPLETS, COMPUTE_UNITS, INTERPRETED, Config
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy
from zaya_kernels.moe_permute.op import count_by_expert, gather, rest_of, scatter, sort_by_expert
from zaya_kernels.newton_schulz.op import QUINTIC
from zaya_kernels.norm_residual.op import ResidualScales, residual_norm
from zaya_kernels.router.op import RouterContext, RouterWeights, router

from zaya_train.model.rope import rotary_tables

from ..helpers.kernels import error, random
from ..helpers.models import CPU
from ..helpers.mutation import shrink
from ..helpers.vast import allocate_vast, vast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

pytest.importorskip("triton", reason="the extra `triton` is not installed")

import triton.language as tl
from triton.runtime import interpreter
from zaya_kernels.attention import triton_kernels as attention_kernels
from zaya_kernels.cca import triton_backward as cca_backward
from zaya_kernels.cca import triton_kernels as cca_forward
from zaya_kernels.grouped_mlp import triton as mlp_host
from zaya_kernels.grouped_mlp import triton_kernels as mlp_kernels
from zaya_kernels.linear_cross_entropy import triton as loss_host
from zaya_kernels.linear_cross_entropy import triton_kernels as loss_kernels
from zaya_kernels.moe_permute import triton as permute_host
from zaya_kernels.moe_permute import triton_kernels as permute_kernels
from zaya_kernels.newton_schulz import triton as newton_host
from zaya_kernels.newton_schulz import triton_kernels as newton_kernels
from zaya_kernels.norm_residual import triton as norm_host
from zaya_kernels.router import triton as router_host
from zaya_kernels.router import triton_kernels as router_kernels
from zaya_kernels.workshop.interpreter import addresses_only, install
from zaya_kernels.workshop.order import programs_chosen

KERNELS = (
    norm_host, cca_forward, cca_backward, attention_kernels, router_kernels, permute_kernels,
    mlp_kernels, loss_kernels, newton_kernels,
)  # fmt: skip

WIDE, LAST = 16_384, 3
TOKENS = 2**31 // WIDE + LAST
"""The last rows start where 32 bits end."""
TOLERANCE = 2**-7
"""Of bf16: a wrong address is no rounding."""


def int32_range(*bounds: Any) -> Iterator[Any]:
    """`range` as it is compiled: the interpreter's gives Python's numbers, which never overflow."""
    for number in range(*bounds):
        yield tl.tensor(interpreter.TensorHandle(np.array([number], np.int32), tl.int32), tl.int32)


Chosen = dict[str, int]
"""How many programs of a kernel run, the last ones; all of one that is not named."""


@pytest.fixture(autouse=True)
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()
    install()
    for module in KERNELS:
        monkeypatch.setattr(module, "range", int32_range, raising=False)
    allocate_vast(monkeypatch)
    monkeypatch.setitem(CHIPLETS, INTERPRETED, 1)
    with addresses_only():
        yield


def last(chosen: Chosen) -> Callable[[str, int], Sequence[int]]:
    return lambda name, programs: range(programs)[-chosen.get(name, programs) :]


def rows(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[1, TOKENS, ...]: numbers in the last rows."""
    made = vast((1, TOKENS, *shape), dtype)
    made[:, -LAST:] = random(1, LAST, *shape, seed=seed, dtype=dtype)
    return made


def passed(run: Callable[[Mapping[str, Tensor]], Sequence[Tensor]], x: Mapping[str, Tensor],
           far: bool) -> dict[str, Tensor]:  # fmt: skip
    """Outputs, and gradients of a projection of their last rows; of rows the last ones."""
    leaves = {name: value.detach().requires_grad_(True) for name, value in x.items()}
    outputs = run(leaves)
    weights = []
    for i, out in enumerate(outputs):
        made = vast(tuple(out.shape), out.dtype)
        tail = made[:, -LAST:] if made.dim() > 1 else made
        tail.copy_(random(*tail.shape, seed=100 + i))
        weights.append(made)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    found |= dict(zip(leaves, gradients, strict=True))
    return {n: v[:, -LAST:] if far and v.dim() > 1 and v.shape[1] == TOKENS else v
            for n, v in found.items()}  # fmt: skip


def near(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last rows alone, in float64."""
    return {n: (v[:, -LAST:] if v.dim() > 1 and v.shape[1] == TOKENS else v).double()
            for n, v in x.items()}  # fmt: skip


def check_norm_residual() -> None:
    """Programs walk over rows, one in so many."""
    names = tuple(ResidualScales.__dataclass_fields__)
    x = {"stream": rows(WIDE, seed=1, dtype=torch.float32), "branch": rows(WIDE, seed=2)}
    x |= {name: random(WIDE, seed=3 + i).bfloat16() for i, name in enumerate((*names, "weight"))}

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        scales = ResidualScales(*(x[name] for name in names))
        return residual_norm(x["stream"], x["branch"], scales, x["weight"], 1e-5, backend)

    def those(name: str, programs: int) -> Sequence[int]:
        return sorted((TOKENS - 1 - i) % programs for i in range(LAST))

    compare(run, x, those)


def check_cca() -> None:
    """Slices of rows of a joint product; the last document is the last rows. Forward, the last
    row has a block to itself; backward, a program has one block."""
    heads, kv_heads, size = 2, 1, 32
    channels, half = (heads + kv_heads) * size, kv_heads * size // 2
    joint = rows(WIDE, seed=1)
    names = ("qk", "v_now", "v_delayed")
    x = dict(zip(names, torch.split(joint[..., : channels + 2 * half], [channels, half, half], -1),
                 strict=True))  # fmt: skip
    shapes = ((channels, 2), (channels,), (heads + kv_heads, size, 2 * size), (channels,))
    weights = zip(CCAWeights.__dataclass_fields__, (*shapes, (kv_heads,)), strict=True)
    x |= {name: random(*shape, seed=2 + i).bfloat16() for i, (name, shape) in enumerate(weights)}
    positions = torch.arange(TOKENS).unsqueeze(0)
    positions[:, -LAST:] -= TOKENS - LAST
    cos, sin = rotary_tables(positions, 1e4, 16)

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        own = x["qk"].shape[1]
        weights = CCAWeights(*(x[name] for name in CCAWeights.__dataclass_fields__))
        places = (positions[:, -own:], cos[:, -own:], sin[:, -own:])
        context = CCAContext(heads, *places, None, None)
        return cca(Projections(*(x[name] for name in names)), weights, context, backend)

    def those(name: str, programs: int) -> Sequence[int]:
        if name == "cca_forward":
            return range(programs)[-2:]
        # As many parts as blocks: the last one of the key, and of both queries.
        splits = programs // (heads + kv_heads)
        return [splits - 1, programs - 2, programs - 1]

    compare(run, x, those)


def check_attention() -> None:
    """As wide as 128 heads of 128; the last document's last head."""
    heads, size = WIDE // 128, 128
    x = {name: rows(heads, size, seed=i) for i, name in enumerate("qkv")}

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        own = x["q"].shape[1]
        documents = [Segment(0, own - LAST, 0, own - LAST)] if own > LAST else []
        documents.append(Segment(own - LAST, LAST, own - LAST, LAST))
        plan = plan_attention(documents, own, CPU, whole_rows=False)
        return [attention(x["q"], x["k"], x["v"], plan, backend)]

    # A tile is two blocks or four.
    compare(run, x, lambda name, programs: range(programs)[-4:], lambda v: v[..., -1, :])


def check_router() -> None:
    width, classes = 16, 5
    x = {"x": rows(WIDE, seed=1), "previous": rows(width, seed=2, dtype=torch.float32)}
    vectors = ("down_bias", "depth_scale", "norm", "fc1_bias", "fc2_bias")
    shapes: dict[str, tuple[int, ...]]
    shapes = dict.fromkeys(RouterWeights.__dataclass_fields__, (width, width))
    shapes |= dict.fromkeys(vectors, (width,)) | {"down": (width, WIDE), "out": (classes, width)}
    for i, (name, shape) in enumerate(shapes.items()):
        x[name] = (random(*shape, seed=3 + i) / (shape[-1] ** 0.5)).bfloat16()
    choice = torch.arange(TOKENS).unsqueeze(0) % classes

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        own = choice[:, -x["x"].shape[1] :]
        zeros = torch.zeros(classes)
        context = RouterContext(zeros, own >= 0, 1e-5, own, zeros)
        weights = RouterWeights(*(x[name] for name in RouterWeights.__dataclass_fields__))
        routed = router(x["x"], x["previous"], weights, context, backend)
        return [routed.probability, routed.state]

    # Two blocks of rows are two programs, or as many as WIDE has blocks of columns.
    def those(name: str, programs: int) -> Sequence[int]:
        by_columns = programs > TOKENS // 2 or name == "router_grad_weight"
        return range(programs)[-2 * (WIDE // 1024 if by_columns else 1) :]

    compare(run, x, those)


def check_moe_permute() -> None:
    """The last tokens go to the last expert, so their places are the last ones, too."""
    choice = torch.zeros(TOKENS, dtype=torch.int64)
    choice[-LAST:] = 1
    x = {"tokens": rows(WIDE, seed=1), "probability": rows(seed=2)}

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        tokens, probability = x["tokens"].squeeze(0), x["probability"].squeeze(0)
        load = count_by_expert(choice[-len(tokens) :], 2, backend)
        order = sort_by_expert(load, len(tokens))
        found, left = gather(tokens, order)
        return [scatter(found, order, rest_of(left, order), probability).unsqueeze(0)]

    def those(name: str, programs: int) -> Sequence[int]:
        return range(programs)[-LAST if programs == TOKENS else 0 :]

    compare(run, x, those)


def check_grouped_mlp() -> None:
    """The last expert has the last rows."""
    width = 32
    x = {"rows": rows(WIDE, seed=1)}
    x["gate_up"] = (random(2, 2 * width, WIDE, seed=2) / WIDE**0.5).bfloat16()
    x["down"] = (random(2, WIDE, width, seed=3) / width**0.5).bfloat16()
    # Those of the first expert are zeros, and so are their gradients.
    x["gate_up"][0] = 0
    x["down"][0] = 0

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        own = x["rows"].shape[1]
        counts = torch.tensor([own - LAST, LAST])
        own_rows = x["rows"].squeeze(0)
        return [grouped_mlp(own_rows, counts, x["gate_up"], x["down"], backend).unsqueeze(0)]

    # One tile of rows, and one that the counts leave spare; of the gradients the last expert's.
    by_columns = WIDE // 512
    chosen = {
        "grouped_mlp_up": 2,
        "grouped_mlp_grad_hidden": 2,
        "grouped_mlp_down": 2 * by_columns,
        "grouped_mlp_grad_rows": 2 * by_columns,
        "grouped_mlp_grad_gate_up": by_columns,
        "grouped_mlp_grad_down": by_columns,
    }
    compare(run, x, last(chosen))


def check_loss() -> None:
    """As many classes; those of the last two blocks stand for all."""
    hidden, weight = random(2, WIDE, seed=1).bfloat16(), vast((TOKENS, WIDE), torch.bfloat16)
    weight[-LAST:] = (random(LAST, WIDE, seed=2) / WIDE**0.5).bfloat16()

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        labels = torch.tensor([1, 3])
        return [linear_cross_entropy(x["hidden"], x["weight"], len(x["weight"]) - labels, backend)]

    by_columns = WIDE // 1024
    chosen = {
        "loss_scores": 2,
        "loss_grad_hidden": 2 * by_columns,
        "loss_grad_weight": 2 * by_columns,
        "loss_finish": 2,
    }
    few = {"hidden": hidden.double(), "weight": weight[-256 - LAST :].double()}
    compare(
        run,
        {"hidden": hidden, "weight": weight},
        last(chosen),
        lambda v: v[-LAST:] if v.dim() else v,
        few,
    )


def check_newton_schulz() -> None:
    """A matrix a token, each of one tile."""
    x = vast((TOKENS, 128, 128), torch.bfloat16)
    x[-LAST:] = (random(LAST, 128, 128, seed=1) / 128).bfloat16()
    a, b, c = QUINTIC
    with programs_chosen(lambda name, programs: range(programs)[-LAST:]):
        gram = newton_host.gram_of(x)
        polynomial = newton_host.polynomial_of(gram, QUINTIC)
        square = newton_host.product(polynomial, polynomial)
        found = [gram, newton_host.times(polynomial, gram), square.rest]
        found.append(newton_host.apply(square, x, torch.bfloat16))
    few = x[-LAST:].double()
    gram = few @ few.mT
    exact = a * torch.eye(128) + b * gram + c * gram @ gram
    squared = exact @ exact
    rest = squared - torch.diag_embed(squared.diagonal(dim1=1, dim2=2))
    for mine, expected in zip(found, (gram, exact @ gram, rest, squared @ few), strict=True):
        assert error(mine[-LAST:], expected) <= TOLERANCE


def compare(
    run: Callable[[str, Mapping[str, Tensor]], Sequence[Tensor]],
    x: Mapping[str, Tensor],
    choose: Callable[[str, int], Sequence[int]],
    part: Callable[[Tensor], Tensor] = lambda v: v,
    few: Mapping[str, Tensor] | None = None,
) -> None:
    with programs_chosen(choose):
        found = passed(lambda x: run("triton", x), x, True)
    expected = passed(lambda x: run("reference", x), few or near(x), False)
    assert found.keys() == expected.keys()
    errors = {name: error(part(value), part(expected[name])) for name, value in found.items()}
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE} == {}


CHECKS = {
    "norm_residual": check_norm_residual,
    "cca": check_cca,
    "attention": check_attention,
    "router": check_router,
    "moe_permute": check_moe_permute,
    "grouped_mlp": check_grouped_mlp,
    "linear_cross_entropy": check_loss,
    "newton_schulz": check_newton_schulz,
}


@pytest.fixture(autouse=True)
def quick(far: None, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks of WIDE columns, short stretches of rows."""
    monkeypatch.setitem(COMPUTE_UNITS, INTERPRETED, {"cca": 2**20}.get(op, 4096))
    monkeypatch.setattr(mlp_host, "GROUP", 1)
    up, by_rows = (
        {INTERPRETED: Config({"BM": 16, "BN": columns, "BK": 512})} for columns in (32, 512)
    )
    weights = {INTERPRETED: Config({"BM": 512, "BN": 512, "BK": 16})}
    up = mlp_host._in_parts(up, gfx942=1)
    tables = mlp_host._table(up, by_rows, by_rows, weights)
    monkeypatch.setitem(mlp_host.CONFIGS, "many", tables)
    sizes = {"BM": 16, "BN": 1024, "BK": 1024, "BT": 64}
    shrink(router_host.CONFIGS, INTERPRETED, sizes, monkeypatch)
    shrink(permute_host.CONFIGS, INTERPRETED, {"BT": 2**13, "BB": 2**5}, monkeypatch)
    monkeypatch.setattr(permute_host, "_BLOCK_NUMBERS", 2**15)
    sizes = {"BM": 16, "BN": 256, "BK": 1024, "BT": 32, "BLOCK": 2**16}
    shrink(loss_host.CONFIGS, INTERPRETED, sizes, monkeypatch)
    for name, blocks in (
        ("loss_grad_hidden", {"BM": 16, "BN": 1024, "BK": 256}),
        ("loss_grad_weight", {"BM": 256, "BN": 1024, "BK": 16}),
    ):
        monkeypatch.setitem(loss_host.CONFIGS, name, {INTERPRETED: Config(blocks)})
    sizes = {"T": 128, "BM": 128, "BN": 128, "BK": 128, "GROUP": 1, "XCDS": 1}
    shrink(newton_host.CONFIGS, INTERPRETED, sizes, monkeypatch)


@pytest.mark.parametrize("op", CHECKS)
def test_the_last_rows_are_reached(op: str) -> None:
    CHECKS[op]()
