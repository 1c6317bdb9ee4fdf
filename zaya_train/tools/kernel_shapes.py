"""The operations of a model as they are timed: inputs, back ends and least work at a shape.

Legend: T tokens, D hidden, H query heads, K KV heads, d head dim, C = (H + K) d, R router width,
E experts, F expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from zaya_train.config.schema import ModelConfig

    Implementation = Callable[..., Any]

LOSS_TOKENS = 16_384
"""At most; the loss works through tokens in chunks, so more of them tell nothing new."""
NORM, RESIDUAL = "norm_residual (norm)", "norm_residual (residual)"


@dataclass(frozen=True)
class Shape:
    """Rows of packed documents under a recipe's model."""

    name: str
    recipe: str
    rows: tuple[tuple[int, ...], ...]
    """Document lengths of each row; all rows are equally long, without padding."""

    @property
    def row_tokens(self) -> int:
        return sum(self.rows[0])

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.row_tokens


SHAPES = (
    Shape("8b_4k", "zaya1_8b", ((4096,),) * 8),
    Shape("8b_packed", "zaya1_8b", ((1, 63, 1000, 2047, 4099, 9001, 16557),)),
    Shape("8b_131k", "zaya1_8b", ((131_072,),)),
    Shape("8b_odd", "zaya1_8b", ((1, 2, 1000, 3003),)),
    Shape("smoke", "smoke_cpu", ((128,),) * 8),
    Shape("smoke_odd", "smoke_cpu", ((1, 40, 63, 21),)),
)
_CHECKED = ((1, 63, 1000, 984),)


def to_check(shape: Shape) -> Shape:
    """The shape at which back ends are compared with the reference in float64, whose scores and
    logits would not fit for many tokens."""
    few = shape.tokens <= sum(_CHECKED[0])
    return shape if few else Shape(shape.name, shape.recipe, _CHECKED)


@dataclass(frozen=True)
class Timed:
    """One operation at one shape."""

    op: str
    """Its key in `kernels`, and which part of it where there are several."""
    backends: Mapping[str, Implementation]
    call: Callable[[Implementation, Mapping[str, Tensor]], Sequence[Tensor]]
    """A back end on the inputs -> outputs."""
    inputs: Mapping[str, Tensor]
    """fp32; all of them get gradients."""
    operations: int
    """Of the forward pass: two for each multiply-add of its products, of an elementwise operation
    each sum, product and root. The fewest there can be, the same for every back end."""
    backward_factor: float = 2.0
    """Operations of the backward pass over those of the forward: the gradient of either factor of
    a product costs as much as the product."""
    wide: frozenset[str] = frozenset()
    """Inputs that are fp32 whatever the rest is."""
    differentiable: bool = True
    context_bytes: int = 0
    """Of what every pass reads besides: positions, rotation."""
    between: int = 0
    """Numbers of the compute type that every pass writes and reads besides, because something else
    happens to them in between."""
    by_tokens: bool = True
    """Whether the shape's rows make a difference."""

    def rounded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs in the compute type."""
        return {name: x if name in self.wide else x.to(dtype) for name, x in self.inputs.items()}

    def work(self, inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> dict[str, Work]:
        """By pass: every tensor read or written once, and the operations."""
        read, written = _bytes(inputs.values()), _bytes(outputs)
        narrow = next(x for name, x in inputs.items() if name not in self.wide)
        besides = self.context_bytes + 2 * self.between * narrow.element_size()
        forward = Work(self.operations, read + written + besides)
        if not self.differentiable:
            return {"forward": forward}
        # Inputs and the outputs' gradients are read, the inputs' gradients written.
        operations = round(self.backward_factor * self.operations)
        backward = Work(operations, 2 * read + written + besides)
        both = Work(forward.operations + operations, forward.bytes + backward.bytes)
        return {"forward": forward, "backward": backward, "both": both}


@dataclass(frozen=True)
class Work:
    """The least that a pass has to do."""

    operations: int
    bytes: int


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@dataclass(frozen=True)
class _Maker:
    model: ModelConfig
    shape: Shape
    device: torch.device

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


def operations_at(model: ModelConfig, shape: Shape, device: torch.device) -> list[Timed]:
    """Every operation of a training step."""
    maker = _Maker(model, shape, device)
    makers = (
        _cca, _attention, _norm, _residual, _router, _permutation, _experts, _loss, _newton_schulz,
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
    places = _bytes((layout.positions, cos, sin))
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
    names = tuple(norm_residual.ResidualScales.__dataclass_fields__)
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
        context_bytes=_bytes((choice,)),
        between=int((choice < experts).sum()) * hidden,
    )


def _experts(make: _Maker) -> Timed:
    """Even loads where the tokens divide; else the first expert has none and the last the rest."""
    model, tokens = make.model, make.shape.tokens
    experts, hidden, width = model.num_experts, model.hidden_size, model.expert_ffn_size
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
    vocabulary = make.model.vocab_size
    labels = torch.arange(tokens, device=make.device) * 7 % vocabulary
    labels[::5] = IGNORE_LABEL
    inputs = {
        "hidden": make.random(tokens, hidden, seed=40),
        "weight": make.random(vocabulary, hidden, seed=41, scale=hidden**-0.5),
    }
    return Timed(
        "linear_cross_entropy",
        loss.BACKENDS,
        lambda run, x: [run(x["hidden"], x["weight"], labels, IGNORE_LABEL, 0.0)],
        inputs,
        2 * int((labels != IGNORE_LABEL).sum()) * hidden * vocabulary,
    )


def _newton_schulz(make: _Maker) -> Timed:
    """One layer's experts, gate and up; five steps."""
    model, polynomials = make.model, newton_schulz.FIVE_QUINTICS
    rows, columns = 2 * model.expert_ffn_size, model.hidden_size
    inputs = {"matrices": make.random(model.num_experts, rows, columns, seed=45)}
    small, large = sorted((rows, columns))

    def call(run: Implementation, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        matrices = x["matrices"]
        return [run(matrices, polynomials, matrices.dtype)]

    return Timed(
        "newton_schulz",
        newton_schulz.BACKENDS,
        call,
        inputs,
        2 * len(polynomials) * model.num_experts * (2 * small * small * large + small**3),
        differentiable=False,
        by_tokens=False,
    )
