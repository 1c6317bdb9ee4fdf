"""The shipped kernels at the shapes they are tuned for: what is compiled, counted and timed.

Shapes are one layer of ZAYA1-8B (arXiv 2605.05365) on 8 sequences of 4,096 tokens.

Legend: B batch, S sequence, D hidden, H query heads, K KV heads, d head dim, C = (H + K) d, V
classes, E experts, F expert width, R router width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.attention.op import attention
from zaya_kernels.attention.segments import Segment, plan_attention
from zaya_kernels.cca.op import CCAContext, CCAWeights, Projections, cca
from zaya_kernels.grouped_mlp.op import grouped_mlp
from zaya_kernels.grouped_mlp.types import MainGradients
from zaya_kernels.launch import Launch, recording
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy
from zaya_kernels.moe_permute.op import count_by_expert, gather, rest_of, scatter, sort_by_expert
from zaya_kernels.newton_schulz.op import FIVE_QUINTICS, newton_schulz
from zaya_kernels.norm_residual.op import (
    ResidualScales,
    residual,
    residual_norm,
    rms_norm,
    stream_norm,
)
from zaya_kernels.router.op import RouterContext, RouterWeights, router

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

B, S, D, H, K, HEAD_DIM, TAPS, ROTATED = 8, 4096, 2048, 8, 2, 128, 2, 64
C = (H + K) * HEAD_DIM
R, CLASSES = 256, 17
V, LOSS_TOKENS = 262_272, 2048
"""The loss's classes and tokens: several chunks, of which the first sets the weight's gradient and
the others add to it."""
E, F = 16, 2048


@dataclass(frozen=True)
class Shipped:
    """One operation in one form, forward and backward."""

    op: str
    case: str
    build: Callable[[torch.device], tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]]
    """Inputs on a device: a function of the back end that gives the outputs, and the leaves, of
    which an operation without a backward has none."""

    @property
    def name(self) -> str:
        return f"{self.op}/{self.case}"

    def run(self, backend: str, device: torch.device) -> None:
        """One pass, with the backward if there is one; on `meta` in `recording` it only records."""
        forward, leaves = self.build(device)
        outputs = forward(backend)
        if not leaves:
            return
        torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])


def _tensor(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    made = torch.empty(shape, dtype=dtype, device=device)
    return (made if device.type == "meta" else made.normal_()).requires_grad_(True)


def _norm_residual(
    device: torch.device,
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    stream, branch = _tensor(device, B, S, D, dtype=torch.float32), _tensor(device, B, S, D)
    vectors = [_tensor(device, D) for _ in range(5)]
    scales = ResidualScales(*vectors[:4])

    def forward(backend: str) -> Sequence[Tensor]:
        return residual_norm(stream, branch, scales, vectors[4], 1e-5, backend)

    return forward, [stream, branch, *vectors]


def _residual(device: torch.device) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    stream, branch = _tensor(device, B, S, D, dtype=torch.float32), _tensor(device, B, S, D)
    vectors = [_tensor(device, D) for _ in range(4)]
    scales = ResidualScales(*vectors)
    return lambda backend: [residual(stream, branch, scales, backend)], [stream, branch, *vectors]


def _norm(device: torch.device) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    x, weight = _tensor(device, B, S, D, dtype=torch.float32), _tensor(device, D)
    return lambda backend: [rms_norm(x, weight, 1e-5, backend)], [x, weight]


def _stream_norm(
    device: torch.device,
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    x, weight = _tensor(device, B, S, D, dtype=torch.float32), _tensor(device, D)
    return lambda backend: stream_norm(x, weight, 1e-5, backend), [x, weight]


def _cca(
    device: torch.device, chunks: int | None
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    width = K * HEAD_DIM // 2
    joint = _tensor(device, B, S, C + 2 * width)
    weights = CCAWeights(
        depthwise=_tensor(device, C, TAPS),
        depthwise_bias=_tensor(device, C),
        grouped=_tensor(device, H + K, HEAD_DIM, HEAD_DIM * TAPS),
        grouped_bias=_tensor(device, C),
        temperature=_tensor(device, K),
    )
    positions = torch.arange(S, device=device).expand(B, S).contiguous()
    angles = positions.unsqueeze(-1) * torch.rand(ROTATED // 2, device=device)
    halos: list[Tensor | None] = [None, None]
    if chunks:
        halos = [
            _tensor(device, B, chunks, rows, size) for rows, size in ((2 * TAPS - 2, C), (1, width))
        ]
    context = CCAContext(H, positions, angles.cos(), angles.sin(), *halos)
    leaves = [joint, *vars(weights).values(), *(halo for halo in halos if halo is not None)]

    def forward(backend: str) -> Sequence[Tensor]:
        qk, v_now, v_delayed = torch.split(joint, [C, width, width], dim=-1)
        return cca(Projections(qk, v_now, v_delayed), weights, context, backend)

    return forward, leaves


def _attention(
    device: torch.device, head_dim: int, dtype: torch.dtype
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    heads = (H, K, K)
    q, k, v = (_tensor(device, B, S, count, head_dim, dtype=dtype) for count in heads)
    documents = [Segment(b * S, S, b * S, S) for b in range(B)]
    plan = plan_attention(documents, B * S, device, whole_rows=True)
    return lambda backend: [attention(q, k, v, plan, backend)], [q, k, v]


def _newton_schulz(
    device: torch.device, rows: int, columns: int, dtype: torch.dtype
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    """One layer's experts, as Muon hands them over."""
    matrices = _tensor(device, E, rows, columns, dtype=torch.float32).detach()
    return lambda backend: [newton_schulz(matrices, FIVE_QUINTICS, dtype, backend)], []


def _loss(
    device: torch.device, vocab: int, dtype: torch.dtype
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    hidden, weight = (_tensor(device, rows, D, dtype=dtype) for rows in (LOSS_TOKENS, vocab))
    labels = torch.arange(LOSS_TOKENS, device=device) % vocab
    return lambda backend: [linear_cross_entropy(hidden, weight, labels, backend)], [hidden, weight]


def _moe_permute(
    device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    """As in the model: tokens without an expert put out themselves."""
    tokens = _tensor(device, B * S, D, dtype=dtype)
    probability = _tensor(device, B * S, dtype=torch.float32)
    choice = torch.arange(B * S, device=device) % CLASSES

    def forward(backend: str) -> Sequence[Tensor]:
        order = sort_by_expert(count_by_expert(choice, E, backend))
        rows, left = gather(tokens, order)
        return [scatter(rows, order, rest_of(left, order), probability)]

    return forward, [tokens, probability]


def _grouped_mlp(
    device: torch.device, rows: int, dtype: torch.dtype, main: bool = False
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    """With main gradients the pre-activation is made again, too."""
    shapes = (rows, D), (E, 2 * F, D), (E, D, F)
    x, gate_up, down = (_tensor(device, *shape, dtype=dtype) for shape in shapes)
    counts = torch.full((E,), rows // E, device=device)
    sums = None
    if main:
        sums = MainGradients(*(torch.zeros(shape, device=device) for shape in shapes[1:]))

    def forward(backend: str) -> Sequence[Tensor]:
        return [grouped_mlp(x, counts, gate_up, down, backend, recompute=main, main=sums)]

    return forward, [x] if main else [x, gate_up, down]


def _router(
    device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    x = _tensor(device, B, S, D, dtype=dtype)
    previous = _tensor(device, B, S, R, dtype=torch.float32)
    shapes = [(R, D), (R,), (R,), (R,), (R, R), (R,), (R, R), (R,), (CLASSES, R)]
    weights = [_tensor(device, *shape, dtype=dtype) for shape in shapes]
    balancing = torch.zeros(CLASSES, device=device)
    context = RouterContext(balancing, torch.ones(B, S, dtype=torch.bool, device=device), 1e-5)

    def forward(backend: str) -> Sequence[Tensor]:
        routed = router(x, previous, RouterWeights(*weights), context, backend)
        return [routed.probability, routed.state]

    return forward, [x, previous, *weights]


REGISTRY = (
    Shipped("norm_residual", "fused", _norm_residual),
    Shipped("norm_residual", "residual", _residual),
    Shipped("norm_residual", "norm", _norm),
    Shipped("norm_residual", "stream", _stream_norm),
    Shipped("cca", "whole", lambda device: _cca(device, None)),
    Shipped("cca", "chunks", lambda device: _cca(device, 2)),
    Shipped("attention", "128", lambda device: _attention(device, 128, torch.bfloat16)),
    Shipped("attention", "64", lambda device: _attention(device, 64, torch.bfloat16)),
    Shipped("attention", "fp32", lambda device: _attention(device, 128, torch.float32)),
    Shipped("router", "bf16", lambda device: _router(device, torch.bfloat16)),
    Shipped(
        "linear_cross_entropy", "262272", lambda device: _loss(device, 262_272, torch.bfloat16)
    ),
    # Of the full vocabulary a fp32 weight is over 2 GiB, which is slower to address.
    Shipped("linear_cross_entropy", "fp32", lambda device: _loss(device, 65_536, torch.float32)),
    Shipped("moe_permute", "bf16", lambda device: _moe_permute(device, torch.bfloat16)),
    Shipped("moe_permute", "fp32", lambda device: _moe_permute(device, torch.float32)),
    Shipped("grouped_mlp", "many", lambda device: _grouped_mlp(device, B * S, torch.bfloat16)),
    Shipped(
        "grouped_mlp", "main", lambda device: _grouped_mlp(device, B * S, torch.bfloat16, True)
    ),
    Shipped("grouped_mlp", "few", lambda device: _grouped_mlp(device, S, torch.bfloat16)),
    Shipped("grouped_mlp", "fp32", lambda device: _grouped_mlp(device, S, torch.float32)),
    Shipped("newton_schulz", "2:1", lambda d: _newton_schulz(d, 2 * D, D, torch.bfloat16)),
    Shipped("newton_schulz", "fp32", lambda d: _newton_schulz(d, 2 * D, D, torch.float32)),
)


def launches(arch: str) -> list[tuple[str, Launch]]:
    """(case, launch) of every kernel of the registry as made for `arch`, once for each set of
    constants; the case of a kernel's second set ends in 2, and so on."""
    found = []
    for shipped in REGISTRY:
        with recording(arch) as recorded:
            shipped.run("triton", torch.device("meta"))
        variants: dict[str, list[Mapping[str, Any]]] = {}
        for launch in recorded:
            known = variants.setdefault(launch.name, [])
            if launch.keywords not in known:
                known.append(launch.keywords)
                number = "" if len(known) == 1 else f" {len(known)}"
                found.append((shipped.name + number, launch))
    return found
