"""The operations of a model at a shape: inputs, back ends and least work, for whoever compares back
ends (`zaya doctor`) or times them (`zaya kernels bench`).

Legend: T tokens, D hidden, H query heads, K KV heads, d head dim, C = (H + K) d, R router width,
E experts, F expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from zaya_kernels.attention import op as attention
from zaya_kernels.cca import op as cca
from zaya_kernels.grouped_mlp import op as grouped_mlp
from zaya_kernels.linear_cross_entropy import op as loss
from zaya_kernels.moe_permute import op as moe_permute
from zaya_kernels.newton_schulz import op as newton_schulz
from zaya_kernels.norm_residual import op as norm_residual
from zaya_kernels.router import op as router

from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.model.layout import SequenceLayout
from zaya_train.model.rope import rotary_tables
from zaya_train.tools.kernel_shapes import Shape, Timed, bytes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from zaya_kernels.newton_schulz.types import Polynomials

    from zaya_train.config.schema import ModelConfig
    from zaya_train.tools.kernel_shapes import Implementation

LOSS_TOKENS = 16_384
"""At most; the loss works through tokens in chunks, so more of them tell nothing new."""
NORM, RESIDUAL = "norm_residual (norm)", "norm_residual (residual)"
RESIDUAL_NORM, STREAM_NORM = "norm_residual (fused)", "norm_residual (stream)"
_SCALES = tuple(norm_residual.ResidualScales.__dataclass_fields__)


@dataclass(frozen=True)
class Most:
    """Numbers that change no kernel's arithmetic, only its time, may be cut."""

    experts: int | None = None
    """Of the expert MLP and of Newton-Schulz."""
    vocabulary: int | None = None
    matrix: int | None = None
    """Smaller side of Newton-Schulz's."""


EVERYTHING = Most()


def _cut(size: int, most: int | None) -> int:
    return size if most is None else min(size, most)


@dataclass(frozen=True)
class _Maker:
    model: ModelConfig
    shape: Shape
    device: torch.device
    polynomials: Polynomials
    most: Most

    def random(self, *size: int, seed: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return scale * torch.randn(size, generator=generator, device=self.device)

    def layout(self) -> SequenceLayout:
        documents = [list(row) for row in self.shape.rows]
        return SequenceLayout.of_documents(documents, self.shape.row_tokens, self.device)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and their tokens."""
        return len(self.shape.rows), self.shape.row_tokens


def operations_at(
    model: ModelConfig,
    shape: Shape,
    device: torch.device,
    polynomials: Polynomials = newton_schulz.FIVE_QUINTICS,
    most: Most = EVERYTHING,
) -> list[Timed]:
    """Every operation of a training step."""
    maker = _Maker(model, shape, device, polynomials, most)
    makers = (
        _cca, _attention, _norm, _residual, _residual_norm, _stream_norm, _router, _permutation,
        _experts, _loss, _newton_schulz,
    )  # fmt: skip
    return [make(maker) for make in makers]


def _cca(make: _Maker) -> Timed:
    model, heads = make.model, make.model.num_query_heads + make.model.num_kv_heads
    d, taps, half = (
        model.head_dim,
        model.conv_grouped_taps,
        model.num_kv_heads * model.head_dim // 2,
    )
    channels, layout = heads * d, make.layout()
    cos, sin = rotary_tables(layout.positions, model.rope_base, int(d * model.rope_fraction))
    context = cca.CCAContext(model.num_query_heads, layout.positions, cos, sin, None, None)
    shallow = model.conv_depthwise_taps
    inputs = {
        "qk": make.random(*make.size, channels, seed=1),
        "v_now": make.random(*make.size, half, seed=2),
        "v_delayed": make.random(*make.size, half, seed=3),
        "depthwise": make.random(channels, shallow, seed=4),
        "depthwise_bias": make.random(channels, seed=5, scale=0.1),
        "grouped": make.random(heads, d, d * taps, seed=6, scale=(d * taps) ** -0.5),
        "grouped_bias": make.random(channels, seed=7, scale=0.1),
        "temperature": make.random(model.num_kv_heads, seed=8) + 2.0,
    }

    def call(run: Implementation, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        weights = cca.CCAWeights(*(x[name] for name in cca.CCAWeights.__dataclass_fields__))
        found: Sequence[Tensor] = run(x["qk"], x["v_now"], x["v_delayed"], weights, context)
        return found

    work = 2 * make.shape.tokens * channels * (d * taps + shallow)
    places = bytes_of((layout.positions, cos, sin))
    return Timed("cca", cca.BACKENDS, call, inputs, work, context_bytes=places)


def _attention(make: _Maker) -> Timed:
    model, plan = make.model, make.layout().attention
    sizes = {"q": model.num_query_heads, "k": model.num_kv_heads, "v": model.num_kv_heads}
    inputs = {
        name: make.random(*make.size, heads, model.head_dim, seed=10 + i)
        for i, (name, heads) in enumerate(sizes.items())
    }
    pairs = sum(n * (n + 1) // 2 for row in make.shape.rows for n in row)
    # Scores and values forward; backward scores again and four gradients: five products to two.
    return Timed(
        "attention",
        attention.BACKENDS,
        lambda run, x: [run(x["q"], x["k"], x["v"], plan)],
        inputs,
        4 * model.num_query_heads * model.head_dim * pairs,
        backward_factor=2.5,
    )


def _norm(make: _Maker) -> Timed:
    hidden, eps = make.model.hidden_size, make.model.norm_eps
    inputs = {
        "x": make.random(*make.size, hidden, seed=20),
        "weight": make.random(hidden, seed=21) + 1.0,
    }
    return Timed(
        NORM,
        norm_residual.NORM_BACKENDS,
        lambda run, x: [run(x["x"], x["weight"], eps)],
        inputs,
        4 * make.shape.tokens * hidden,
        wide=frozenset({"x"}),
    )


def _residual(make: _Maker) -> Timed:
    hidden = make.model.hidden_size
    names = _SCALES
    inputs = {
        name: make.random(*make.size, hidden, seed=22 + i)
        for i, name in enumerate(("stream", "branch"))
    }
    inputs |= {name: make.random(hidden, seed=24 + i) for i, name in enumerate(names)}
    return Timed(
        RESIDUAL,
        norm_residual.RESIDUAL_BACKENDS,
        lambda run, x: [run(x["stream"], x["branch"], *(x[name] for name in names))],
        inputs,
        5 * make.shape.tokens * hidden,
        wide=frozenset({"stream"}),
    )


def _residual_norm(make: _Maker) -> Timed:
    """As the model calls it: the new stream and its norm, fused where the back end can."""
    hidden, eps, names = make.model.hidden_size, make.model.norm_eps, _SCALES
    inputs = {
        name: make.random(*make.size, hidden, seed=80 + i)
        for i, name in enumerate(("stream", "branch"))
    }
    inputs |= {name: make.random(hidden, seed=82 + i) for i, name in enumerate((*names, "weight"))}

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        scales = norm_residual.ResidualScales(*(x[key] for key in names))
        return norm_residual.residual_norm(x["stream"], x["branch"], scales, x["weight"], eps, name)

    return Timed(
        RESIDUAL_NORM,
        {name: partial(run, name) for name in norm_residual.RESIDUAL_BACKENDS},
        lambda of_name, x: of_name(x),
        inputs,
        9 * make.shape.tokens * hidden,
        wide=frozenset({"stream"}),
    )


def _stream_norm(make: _Maker) -> Timed:
    """The stream's norm beside the stream, whose gradients meet in one pass."""
    hidden, eps = make.model.hidden_size, make.model.norm_eps
    inputs = {
        "x": make.random(*make.size, hidden, seed=90),
        "weight": make.random(hidden, seed=91) + 1.0,
    }

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return norm_residual.stream_norm(x["x"], x["weight"], eps, name)

    return Timed(
        STREAM_NORM,
        {name: partial(run, name) for name in norm_residual.NORM_BACKENDS},
        lambda of_name, x: of_name(x),
        inputs,
        4 * make.shape.tokens * hidden,
        wide=frozenset({"x"}),
        handed_on=1,
    )


def _router(make: _Maker) -> Timed:
    """The choice is given: of two classes almost alike either may be right."""
    model, size = make.model, make.model.router_size
    classes = model.num_experts + int(model.skip_class)
    inputs = {
        "x": make.random(*make.size, model.hidden_size, seed=60),
        "previous": make.random(*make.size, size, seed=61),
        "down": make.random(size, model.hidden_size, seed=62, scale=model.hidden_size**-0.5),
        "norm": make.random(size, seed=63) + 1.0,
        "depth_scale": make.random(size, seed=64),
    }
    products = (("fc1", size), ("fc2", size), ("out", classes))
    inputs |= {
        name: make.random(rows, size, seed=65 + i, scale=size**-0.5)
        for i, (name, rows) in enumerate(products)
    }
    biases = ("down_bias", "fc1_bias", "fc2_bias")
    inputs |= {name: make.random(size, seed=68 + i, scale=0.1) for i, name in enumerate(biases)}
    tokens, zeros = make.shape.tokens, torch.zeros(classes, device=make.device)
    choice = torch.arange(tokens, device=make.device).view(make.size) % classes
    valid = torch.ones(make.size, dtype=torch.bool, device=make.device)
    context = router.RouterContext(zeros, valid, model.norm_eps, choice, zeros)

    def call(run: Implementation, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        names = router.RouterWeights.__dataclass_fields__
        wide = torch.promote_types(x["x"].dtype, torch.float32)
        weights = router.RouterWeights(*(x[name] for name in names))
        routed = run(x["x"], x["previous"].to(wide), weights, context)
        return [routed.probability, routed.state]

    work = 2 * tokens * size * (model.hidden_size + 2 * size + classes)
    return Timed("router", router.BACKENDS, call, inputs, work, wide=frozenset({"previous"}))


def _permutation(make: _Maker) -> Timed:
    """There and back without experts in between; one class of tokens goes to none of them."""
    experts, hidden, tokens = make.model.num_experts, make.model.hidden_size, make.shape.tokens
    choice = torch.arange(tokens, device=make.device) * 7 % (experts + 1)
    with_expert = int((choice < experts).sum())

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        load = moe_permute.count_by_expert(choice, experts, name)
        # As in training: eager experts have read the counts on the host, Triton's never do.
        order = moe_permute.sort_by_expert(load, None if name == "triton" else with_expert)
        rows, left = moe_permute.gather(x["tokens"], order)
        rest = moe_permute.rest_of(left, order)
        return [moe_permute.scatter(rows, order, rest, x["probability"])]

    return Timed(
        "moe_permute",
        {name: partial(run, name) for name in moe_permute.BACKENDS},
        lambda of_name, x: of_name(x),
        {
            "tokens": make.random(tokens, hidden, seed=50),
            "probability": make.random(tokens, seed=51),
        },
        tokens * hidden,
        wide=frozenset({"probability"}),
        context_bytes=bytes_of((choice,)),
        between=int((choice < experts).sum()) * hidden,
    )


def _experts(make: _Maker) -> Timed:
    """Even loads where the tokens divide; else the first expert has none and the last the rest."""
    model, tokens = make.model, make.shape.tokens
    experts = _cut(model.num_experts, make.most.experts)
    hidden, width = model.hidden_size, model.expert_ffn_size
    counts = torch.full((experts,), tokens // experts, device=make.device)
    if tokens % experts and experts > 1:
        counts[0] = 0
        counts[-1] += tokens - int(counts.sum())
    inputs = {
        "rows": make.random(tokens, hidden, seed=30),
        "gate_up": make.random(experts, 2 * width, hidden, seed=31, scale=hidden**-0.5),
        "down": make.random(experts, hidden, width, seed=32, scale=width**-0.5),
    }
    return Timed(
        "grouped_mlp",
        grouped_mlp.BACKENDS,
        lambda run, x: [run(x["rows"], counts, x["gate_up"], x["down"])],
        inputs,
        6 * int(counts.sum()) * hidden * width,
    )


def _loss(make: _Maker) -> Timed:
    """One in five tokens is not supervised."""
    tokens, hidden = min(make.shape.tokens, LOSS_TOKENS), make.model.hidden_size
    vocabulary = _cut(make.model.vocab_size, make.most.vocabulary)
    labels = torch.arange(tokens, device=make.device) * 7 % vocabulary
    labels[::5] = IGNORE_LABEL
    inputs = {
        "hidden": make.random(tokens, hidden, seed=40),
        "weight": make.random(vocabulary, hidden, seed=41, scale=hidden**-0.5),
    }
    return Timed(
        "linear_cross_entropy",
        loss.BACKENDS,
        lambda run, x: [run(x["hidden"], x["weight"], labels, IGNORE_LABEL, 0.0)[0]],
        inputs,
        2 * int((labels != IGNORE_LABEL).sum()) * hidden * vocabulary,
    )


def _newton_schulz(make: _Maker) -> Timed:
    """One layer's experts, gate and up."""
    model, polynomials = make.model, make.polynomials
    experts = _cut(model.num_experts, make.most.experts)
    sides = (2 * model.expert_ffn_size, model.hidden_size)
    part = _cut(min(sides), make.most.matrix)
    rows, columns = (side * part // min(sides) for side in sides)
    small, large = sorted((rows, columns))
    inputs = {"matrices": make.random(experts, rows, columns, seed=45)}

    def call(run: Implementation, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        matrices = x["matrices"]
        return [run(matrices, polynomials, matrices.dtype)]

    return Timed(
        "newton_schulz",
        newton_schulz.BACKENDS,
        call,
        inputs,
        2 * len(polynomials) * experts * (2 * small * small * large + small**3),
        differentiable=False,
        by_tokens=False,
    )
