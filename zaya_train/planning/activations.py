"""What autograd keeps of one layer for the backward pass, by part, with the eager kernels.

Counted from what the kernels save (`save_for_backward`) and what torch's own operations do; the
rehearsal is the proof (tests/unit/test_forecast.py). `parallel.recompute` changes what is kept
(model/recompute.py).

Legend: T tokens of a micro-batch on a rank, M padded queries, R rows of its experts, n context
ranks, D hidden, H query heads, K KV heads, d head dim, A = H + K, F expert width, r router width,
C router classes, c bytes of a compute element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_train.planning.case import padded_queries

if TYPE_CHECKING:
    from zaya_train.config.schema import RecomputeKind
    from zaya_train.planning.case import Case

_FP32, _INT64 = 4, 8
_ROUTING = 3 * _INT64 + 6
"""Of a token: its expert, its place there and back, its probability twice."""


@dataclass(frozen=True)
class Part:
    """Bytes that one layer keeps for the backward pass."""

    name: str
    formula: str
    bytes: int
    selective: bool = True
    """Kept with recompute=selective too."""
    last: bool = False
    """Freed before the experts' backward pass, which is a layer's fullest moment."""


def layer_parts(case: Case) -> tuple[Part, ...]:
    """Everything one layer keeps without recompute, the router's first state aside."""
    m, c, t = case.model, case.compute_bytes, case.tokens
    big, width, d, r = m.hidden_size, m.expert_ffn_size, m.head_dim, m.router_size
    queries, keys = m.num_query_heads, m.num_kv_heads
    heads, rows = queries + keys, case.received
    classes = m.num_experts + int(m.skip_class)
    padded, context = padded_queries(case), case.layout.context
    halo = _halo_rows(case) * heads * d * _FP32
    # A copy of weights in another dtype, or side by side for one product.
    cast = 0 if c == _FP32 else _FP32
    copies = c * big * (queries + 2 * keys) * d + cast * (
        heads * d * (d * m.conv_grouped_taps + m.conv_depthwise_taps + 2)
    )
    gathered = context * t * 2 * keys * d * c if context > 1 else 0
    cca = 2 * _FP32 * heads * d + _FP32 * heads + _INT64 + 1
    mixed = (2 * queries + 2 * keys) * d * c * padded + queries * d * c * t
    scores = 5 * _FP32 * r + _FP32 * (classes + 1)
    return (
        Part("residual stream", "2 x 4 D T", 2 * _FP32 * big * t),
        Part("norms", "2 (c D + 4) T", 2 * (c * big + _FP32) * t, selective=False),
        Part("CCA", "(2 x 4 A d + 4 A + 9) T", t * cca + halo, selective=False),
        Part("CCA, weights side by side", "c (H + 2 K) d D", copies, selective=False),
        Part("gathered keys and values", "n 2 K d c T", gathered),
        Part("attention", "(2 H + 2 K) d c M + H d c T + 4 H M", mixed + _FP32 * queries * padded),
        Part("branches", "c D T", c * big * t),
        Part("branches", "2 c D T", 2 * c * big * t, last=True),
        Part("experts", "c (D + 2 F) R", c * (big + 2 * width) * rows),
        Part("experts", "routing 30 T", _ROUTING * t),
        Part("router", "(5 x 4 r + 4 C + 4) T", scores * t, selective=False),
        Part("router state", "4 r T", _FP32 * r * t),
        Part("router, weights", "2 x 4 r r", cast * 2 * r * r, selective=False),
    )


def _halo_rows(case: Case) -> int:
    """Rows before each chunk."""
    m = case.model
    chunks = 1
    if case.layout.context > 1 and case.parallel.context_chunks == "head_tail":
        chunks = 2
    return (
        chunks
        * (m.conv_depthwise_taps + m.conv_grouped_taps - 2)
        * case.phase.micro_batch_sequences
    )


def _products(case: Case) -> Part:
    """Results of matrix products that selective recompute keeps and nothing else would."""
    m, c, t = case.model, case.compute_bytes, case.tokens
    channels = (m.num_query_heads + 2 * m.num_kv_heads) * m.head_dim
    classes = m.num_experts + int(m.skip_class)
    size = c * channels * t + (2 * _FP32 * m.router_size + c * m.router_size + _FP32 * classes) * t
    return Part("products", "c (H + 2 K) d T + (8 + c) r T + 4 C T", size)


def kept_parts(case: Case, recompute: RecomputeKind) -> tuple[Part, ...]:
    """What a layer keeps from its forward pass to its backward pass."""
    if recompute == "none":
        return layer_parts(case)
    if recompute == "selective":
        return (*(part for part in layer_parts(case) if part.selective), _products(case))
    m, t = case.model, case.tokens
    return (
        Part("residual stream", "4 D T", _FP32 * m.hidden_size * t),
        Part("router state", "4 r T", _FP32 * m.router_size * t),
        Part("experts", "routing 16 T", 2 * _INT64 * t),
    )


def entry_parts(case: Case) -> tuple[Part, ...]:
    """Kept before the first layer: embedded tokens, the stream, tables of the rotation."""
    m, c, t = case.model, case.compute_bytes, case.tokens
    rotated = int(m.head_dim * m.rope_fraction)
    return (
        Part("embedding", "(c + 4) D T", (c + _FP32) * m.hidden_size * t),
        Part("rotation", "4 rotated T", _FP32 * rotated * t),
    )


def total(parts: tuple[Part, ...]) -> int:
    """Bytes of all of them."""
    return sum(part.bytes for part in parts)
