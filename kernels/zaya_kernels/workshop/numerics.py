"""Interpret every Triton operation on small inputs and print a JSON row per case.

    TRITON_INTERPRET=1 python -m zaya_kernels.workshop.numerics

Each case runs forward and backward with memory checks on, twice, the second time with every
launch's programs in reverse, and is compared with float64; the yardstick is eager torch on the same
inputs.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import torch
from triton.runtime.errors import InterpreterError

from zaya_kernels.attention.segments import Segment, plan_attention
from zaya_kernels.cca.op import CCAContext
from zaya_kernels.grouped_mlp.op import grouped_mlp
from zaya_kernels.launch import COMPUTE_UNITS, INTERPRETED
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy
from zaya_kernels.newton_schulz.op import FIVE_QUINTICS, newton_schulz
from zaya_kernels.norm_residual.op import ResidualScales, residual_norm
from zaya_kernels.router.op import RouterContext, RouterWeights, router
from zaya_kernels.workshop.cases import (
    Case,
    attention_run,
    cca_run,
    error,
    passed,
    permute_run,
    random,
)
from zaya_kernels.workshop.interpreter import install
from zaya_kernels.workshop.order import programs_reversed
from zaya_train.config.labels import IGNORE_LABEL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

FEW = 16
"""Of so few numbers an error is chance."""


def _norm_residual() -> Case:
    vectors = (*ResidualScales.__dataclass_fields__, "weight")
    inputs = {"stream": random(1, 33, 256, seed=1), "branch": random(1, 33, 256, seed=2)}
    inputs |= {name: random(256, seed=3 + i) for i, name in enumerate(vectors)}

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        scales = ResidualScales(*(x[name] for name in vectors[:4]))
        return residual_norm(x["stream"], x["branch"], scales, x["weight"], 1e-5, backend)

    return Case("norm_residual", run, inputs)


def _cca() -> Case:
    """Documents of 1, 1, 60, 2 and 77 tokens in one row: odd blocks, boundaries inside and at the
    edges of them."""
    documents, heads, kv_heads, size = (1, 1, 60, 2, 77), 4, 2, 32
    positions = torch.cat([torch.arange(n) for n in documents]).unsqueeze(0)
    angles = positions.unsqueeze(-1) / 100.0 ** torch.linspace(0, 1, size // 4)
    tokens, channels = positions.shape[1], (heads + kv_heads) * size
    shapes = {
        "qk": (1, tokens, channels),
        "v_now": (1, tokens, kv_heads * size // 2),
        "v_delayed": (1, tokens, kv_heads * size // 2),
        "depthwise": (channels, 2),
        "depthwise_bias": (channels,),
        "grouped": (heads + kv_heads, size, 2 * size),
        "grouped_bias": (channels,),
        "temperature": (kv_heads,),
    }
    inputs = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    inputs["grouped"] /= size**0.5
    context = CCAContext(heads, positions, angles.cos(), angles.sin(), None, None)

    return Case("cca", cca_run(context), inputs)


def _attention() -> Case:
    """Two chunks of a row of three documents, the middle one in both: keys of two segments, blocks
    that are seen whole, on the diagonal and cut short."""
    segments = [Segment(0, 2, 0, 2), Segment(2, 78, 2, 78), Segment(80, 290, 2, 428)]
    segments.append(Segment(370, 1, 430, 1))
    plan = plan_attention(segments, 371, torch.device("cpu"), whole_rows=False)
    inputs = {"q": random(1, 371, 2, 32, seed=1)}
    inputs |= {name: random(1, 440, 1, 32, seed=2 + i) for i, name in enumerate("kv")}

    return Case("attention", attention_run(plan), inputs)


def _newton_schulz() -> Case:
    """Wide enough for the Gram form, with tiles cut short at both edges."""

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [newton_schulz(x["matrices"], FIVE_QUINTICS, x["matrices"].dtype, backend)]

    inputs = {"matrices": random(1, 130, 520, seed=1)}
    return Case("newton_schulz", run, inputs, differentiable=False)


def _loss() -> Case:
    """The last block of classes is not whole, every fifth token is not supervised."""
    inputs = {"hidden": random(70, 32, seed=1), "weight": random(300, 32, seed=2) / 32**0.5}
    labels = torch.arange(70) * 7 % 300
    labels[::5] = IGNORE_LABEL

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [linear_cross_entropy(x["hidden"], x["weight"], labels, backend, 1e-4)]

    return Case("linear_cross_entropy", run, inputs)


def _moe_permute() -> Case:
    """An expert without tokens, and tokens without an expert; more than one block of them."""
    choice = torch.arange(300) ** 2 % 11 % 6
    inputs = {"tokens": random(300, 72, seed=1), "probability": random(300, seed=2)}
    return Case("moe_permute", permute_run(choice, 5), inputs)


def _grouped_mlp() -> Case:
    """An over-full expert, one without rows, widths that no tile divides."""
    counts = torch.tensor([290, 0, 70, 1])
    experts, hidden, width = len(counts), 72, 40
    inputs = {
        "rows": random(int(counts.sum()), hidden, seed=1),
        "gate_up": random(experts, 2 * width, hidden, seed=2) / hidden**0.5,
        "down": random(experts, hidden, width, seed=3) / width**0.5,
    }

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [grouped_mlp(x["rows"], counts, x["gate_up"], x["down"], backend)]

    return Case("grouped_mlp", run, inputs)


def _router() -> Case:
    """The last block of tokens is not whole; the choice is given, for of two classes almost alike
    either may be right. Sums over fewer tokens would err by chance."""
    shapes = {
        "x": (1, 150, 48),
        "previous": (1, 150, 128),
        "down": (128, 48),
        "down_bias": (128,),
        "depth_scale": (128,),
        "norm": (128,),
        "fc1": (128, 128),
        "fc1_bias": (128,),
        "fc2": (128, 128),
        "fc2_bias": (128,),
        "out": (5, 128),
    }
    inputs = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for name in ("down", "fc1", "fc2", "out"):
        inputs[name] /= inputs[name].shape[1] ** 0.5
    context = RouterContext(
        torch.zeros(5),
        torch.ones(1, 150, dtype=torch.bool),
        1e-5,
        torch.arange(150).view(1, 150) % 5,
        torch.full((5,), 30.0),
    )

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        weights = RouterWeights(*(x[name] for name in RouterWeights.__dataclass_fields__))
        work = torch.promote_types(x["x"].dtype, torch.float32)
        routed = router(x["x"], x["previous"].to(work), weights, context, backend)
        return [routed.probability, routed.state]

    return Case("router", run, inputs)


CASES = (
    _norm_residual, _cca, _attention, _router, _loss, _moe_permute, _grouped_mlp, _newton_schulz,
)  # fmt: skip


def judge(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Triton's error beside eager's where their ratio is worst, and every fault found."""
    inputs = {name: value.to(dtype) for name, value in case.inputs.items()}
    result: dict[str, Any] = {"op": case.name, "dtype": str(dtype).removeprefix("torch.")}
    exact = passed(case, "reference", {name: x.double() for name, x in inputs.items()})
    usual = passed(case, "eager", inputs)
    try:
        first = passed(case, "triton", inputs)
        with programs_reversed():
            second = passed(case, "triton", inputs)
    except InterpreterError as fault:
        return {**result, "worst": None, "faults": [str(fault)]}
    errors = {
        name: (error(x, exact[name]), error(usual[name], exact[name]))
        for name, x in first.items()
        if x.numel() > FEW
    }
    faults = [f"{name}: not finite" for name, x in first.items() if not x.isfinite().all()]
    faults += [
        f"{name}: programs in reverse give other bits"
        for name, x in first.items()
        if not torch.equal(x, second[name])
    ]
    worst = max(errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-30))
    mine, theirs = errors[worst]
    step = torch.finfo(dtype).eps / 8
    if not mine <= 1.1 * theirs + step:
        faults.append(f"{worst}: error {mine:.1e}, eager torch has {theirs:.1e}")
    return {**result, "worst": worst, "error": mine, "eager_error": theirs, "faults": faults}


def main() -> int:
    """Rows to standard output."""
    install()
    # Few compute units, so that programs which walk over rows take more than one step.
    COMPUTE_UNITS[INTERPRETED] = 2
    torch.set_num_threads(1)
    for make in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            sys.stdout.write(json.dumps(judge(make(), dtype)) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
