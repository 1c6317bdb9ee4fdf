"""The user's kernel back ends against the reference in float64, on the user's widths.

A back end may err as much as the reference does in the same precision, times `SLACK`: kernels add
up in other orders, they do not compute something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from zaya_kernels.cca.op import CCAContext
from zaya_kernels.dtypes import DTYPES
from zaya_kernels.grouped_mlp.op import grouped_mlp
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy
from zaya_kernels.newton_schulz.op import newton_schulz
from zaya_kernels.norm_residual.op import ResidualScales, residual, rms_norm
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

from zaya_train.config.kernel_rules import PACKAGES
from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.config.newton_schulz import polynomials
from zaya_train.model.layout import SequenceLayout
from zaya_train.model.rope import rotary_tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from zaya_train.config.schema import ModelConfig, MuonConfig, TrainConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TOKENS = 96
DOCUMENTS = (40, 1, 23, 30)
"""Of the TOKENS; two are padding."""
SLACK = 4.0
FLOOR = {"fp32": 1e-6, "bf16": 8e-3}
"""Errors below two units of a precision are rounding whatever the reference's."""
MOST_EXPERTS, MOST_VOCABULARY, MOST_MATRIX = 2, 4096, 256
"""Larger numbers change no kernel's arithmetic, only its time."""


@dataclass(frozen=True)
class Check:
    """A case, and the back end to run it."""

    case: Case
    backend: str
    shape: str


@dataclass(frozen=True)
class Agreement:
    """Largest relative error over outputs and gradients."""

    op: str
    backend: str
    shape: str
    error: float
    reference_error: float
    """Of the reference in the same precision."""
    limit: float
    worst: str

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


def compare_kernels(config: TrainConfig) -> list[Agreement]:
    """Every operation of a step in the configuration's compute precision; besides, in bf16 on the
    GPU, every library that is installed there and has an operation."""
    precision = config.precision.compute_dtype
    libraries = [_LIBRARIES[name](config.model, name) for name in libraries_here()]
    return [_agreement(check, precision, CPU) for check in _checks(config)] + [
        _agreement(check, "bf16", GPU) for check in libraries
    ]


def libraries_here() -> list[str]:
    """Back ends by libraries whose packages are installed, where there is a GPU to run them."""
    there = torch.cuda.is_available()
    return [name for name in _LIBRARIES if there and find_spec(PACKAGES[name][0])]


def _agreement(check: Check, precision: str, device: torch.device) -> Agreement:
    case, dtype = check.case, DTYPES[precision]
    rounded = {name: value.to(dtype) for name, value in case.inputs.items()}
    exact = passed(case, "reference", {n: v.double() for n, v in rounded.items()})
    places = {"reference": rounded}
    places[check.backend] = {name: value.to(device) for name, value in rounded.items()}
    errors = {
        name: {key: error(x.cpu(), exact[key]) for key, x in passed(case, name, where).items()}
        for name, where in places.items()
    }
    own, reference = errors[check.backend], max(errors["reference"].values())
    worst = max(own, key=lambda key: own[key] if own[key] == own[key] else float("inf"))
    limit = max(SLACK * reference, FLOOR[precision])
    return Agreement(case.name, check.backend, check.shape, own[worst], reference, limit, worst)


def _checks(config: TrainConfig) -> list[Check]:
    model, kernels = config.model, config.kernels
    return [
        _cca(model, kernels.cca),
        _attention(model, kernels.attention),
        _norm(model, kernels.norm_residual),
        _residual(model, kernels.norm_residual),
        _router(model, kernels.router),
        _permutation(model, kernels.moe_permute),
        _experts(model, kernels.grouped_mlp),
        _loss(model, kernels.linear_cross_entropy),
        _newton_schulz(model, config.optim.muon, kernels.newton_schulz),
    ]


def _layout() -> SequenceLayout:
    return SequenceLayout.of_documents([list(DOCUMENTS)], TOKENS, CPU)


def _cca(model: ModelConfig, backend: str) -> Check:
    heads, d = model.num_query_heads + model.num_kv_heads, model.head_dim
    channels, half = heads * d, model.num_kv_heads * d // 2
    layout = _layout()
    rotated = int(d * model.rope_fraction)
    cos, sin = rotary_tables(layout.positions, model.rope_base, rotated)
    fan_in = d * model.conv_grouped_taps
    inputs = {
        "qk": random(1, TOKENS, channels, seed=1),
        "v_now": random(1, TOKENS, half, seed=2),
        "v_delayed": random(1, TOKENS, half, seed=3),
        "depthwise": random(channels, model.conv_depthwise_taps, seed=4),
        "depthwise_bias": random(channels, seed=5, scale=0.1),
        "grouped": random(heads, d, fan_in, seed=6, scale=fan_in**-0.5),
        "grouped_bias": random(channels, seed=7, scale=0.1),
        "temperature": random(model.num_kv_heads, seed=8) + 2.0,
    }

    context = CCAContext(model.num_query_heads, layout.positions, cos, sin, None, None)
    shape = f"{heads} heads x {d}, taps {model.conv_depthwise_taps}, {model.conv_grouped_taps}"
    return Check(Case("cca", cca_run(context), inputs), backend, shape)


def _attention(model: ModelConfig, backend: str) -> Check:
    layout = _layout()
    sizes = {"q": model.num_query_heads, "k": model.num_kv_heads, "v": model.num_kv_heads}
    inputs = {
        name: random(1, TOKENS, heads, model.head_dim, seed=10 + i)
        for i, (name, heads) in enumerate(sizes.items())
    }

    shape = f"{model.num_query_heads} over {model.num_kv_heads} heads x {model.head_dim}"
    return Check(Case("attention", attention_run(layout.attention), inputs), backend, shape)


def _norm(model: ModelConfig, backend: str) -> Check:
    hidden = model.hidden_size
    inputs = {"x": random(TOKENS, hidden, seed=20), "weight": random(hidden, seed=21) + 1.0}

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [rms_norm(x["x"], x["weight"], model.norm_eps, name)]

    return Check(Case("norm_residual (norm)", run, inputs), backend, f"{hidden} wide")


def _residual(model: ModelConfig, backend: str) -> Check:
    hidden = model.hidden_size
    names = ("stream_scale", "stream_bias", "branch_scale", "branch_bias")
    inputs = {n: random(TOKENS, hidden, seed=22 + i) for i, n in enumerate(("stream", "branch"))}
    inputs |= {n: random(hidden, seed=24 + i) for i, n in enumerate(names)}

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        scales = ResidualScales(*(x[n] for n in names))
        return [residual(x["stream"], x["branch"], scales, name)]

    return Check(Case("norm_residual (residual)", run, inputs), backend, f"{hidden} wide")


def _router(model: ModelConfig, backend: str) -> Check:
    """The choice is given: of two classes almost alike either may be right."""
    hidden, size = model.hidden_size, model.router_size
    classes = model.num_experts + int(model.skip_class)
    inputs = {
        "x": random(1, TOKENS, hidden, seed=60),
        "previous": random(1, TOKENS, size, seed=61),
        "down": random(size, hidden, seed=62, scale=hidden**-0.5),
        "norm": random(size, seed=63) + 1.0,
        "depth_scale": random(size, seed=64),
    }
    inputs |= {
        name: random(rows, size, seed=65 + i, scale=size**-0.5)
        for i, (name, rows) in enumerate((("fc1", size), ("fc2", size), ("out", classes)))
    }
    names = ("down_bias", "fc1_bias", "fc2_bias")
    inputs |= {name: random(size, seed=68 + i, scale=0.1) for i, name in enumerate(names)}
    choice = torch.arange(TOKENS).view(1, TOKENS) % classes
    valid = torch.ones(1, TOKENS, dtype=torch.bool)
    context = RouterContext(
        torch.zeros(classes), valid, model.norm_eps, choice, torch.zeros(classes)
    )

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        weights = RouterWeights(*(x[n] for n in RouterWeights.__dataclass_fields__))
        wide = torch.promote_types(x["x"].dtype, torch.float32)
        routed = router(x["x"], x["previous"].to(wide), weights, context, name)
        return [routed.probability, routed.state]

    return Check(Case("router", run, inputs), backend, f"{hidden} to {size} to {classes} classes")


def _permutation(model: ModelConfig, backend: str) -> Check:
    experts, hidden = model.num_experts, model.hidden_size
    inputs = {"tokens": random(TOKENS, hidden, seed=50), "probability": random(TOKENS, seed=51)}
    run = permute_run(torch.arange(TOKENS) * 7 % (experts + 1), experts)
    return Check(Case("moe_permute", run, inputs), backend, f"{hidden} to {experts} experts")


def _experts(model: ModelConfig, backend: str) -> Check:
    experts, width = min(MOST_EXPERTS, model.num_experts), model.expert_ffn_size
    hidden = model.hidden_size
    counts = torch.zeros(experts, dtype=torch.int64)
    counts[-1] = TOKENS // 3
    counts[0] += TOKENS - TOKENS // 3
    inputs = {
        "rows": random(TOKENS, hidden, seed=30),
        "gate_up": random(experts, 2 * width, hidden, seed=31, scale=hidden**-0.5),
        "down": random(experts, hidden, width, seed=32, scale=width**-0.5),
    }

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [grouped_mlp(x["rows"], counts, x["gate_up"], x["down"], name)]

    return Check(Case("grouped_mlp", run, inputs), backend, f"{hidden} x {width}")


def _loss(model: ModelConfig, backend: str) -> Check:
    hidden, vocabulary = model.hidden_size, min(MOST_VOCABULARY, model.vocab_size)
    labels = torch.arange(TOKENS) * 7 % vocabulary
    labels[::5] = IGNORE_LABEL
    inputs = {
        "hidden": random(TOKENS, hidden, seed=40),
        "weight": random(vocabulary, hidden, seed=41, scale=hidden**-0.5),
    }

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [linear_cross_entropy(x["hidden"], x["weight"], labels, name)]

    shape = f"{hidden} x {vocabulary:,} classes"
    return Check(Case("linear_cross_entropy", run, inputs), backend, shape)


def _newton_schulz(model: ModelConfig, muon: MuonConfig, backend: str) -> Check:
    rows = min(MOST_MATRIX, model.hidden_size)
    columns = max(1, rows * model.expert_ffn_size // model.hidden_size)
    inputs = {"matrices": random(2, rows, columns, seed=45)}

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        matrices = x["matrices"]
        return [newton_schulz(matrices, polynomials(muon), matrices.dtype, name)]

    shape = f"{rows} x {columns}"
    return Check(Case("newton_schulz", run, inputs, differentiable=False), backend, shape)


_LIBRARIES = {"flash_attn": _attention, "aiter": _attention, "transformer_engine": _experts}
"""Back end -> the check of its operation."""
