"""The shipped kernels at the shapes they are tuned for: what is compiled, counted and timed.

Shapes are one layer of ZAYA1-8B (arXiv 2605.05365) on 8 sequences of 4,096 tokens.

Legend: B batch, S sequence, D hidden, H query heads, K KV heads, d head dim, C = (H + K) d, V
classes, E experts, F expert width, R router width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from zaya_kernels.attention.op import attention
from zaya_kernels.attention.segments import Segment, plan_attention
from zaya_kernels.cca.op import CCAContext, CCAWeights, Projections, cca
from zaya_kernels.grouped_mlp.op import grouped_mlp
from zaya_kernels.grouped_mlp.types import MainGradients
from zaya_kernels.launch import ARCHITECTURES, Launch, recording
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
    from collections.abc import Callable, Hashable, Sequence

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
    architectures: Sequence[str] = ARCHITECTURES

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
    device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    stream = _tensor(device, B, S, D, dtype=torch.float32)
    branch = _tensor(device, B, S, D, dtype=dtype)
    vectors = [_tensor(device, D, dtype=dtype) for _ in range(5)]
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
    device: torch.device, chunks: int | None, dtype: torch.dtype
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    width, tensor = K * HEAD_DIM // 2, partial(_tensor, device, dtype=dtype)
    joint = tensor(B, S, C + 2 * width)
    weights = CCAWeights(
        depthwise=tensor(C, TAPS),
        depthwise_bias=tensor(C),
        grouped=tensor(H + K, HEAD_DIM, HEAD_DIM * TAPS),
        grouped_bias=tensor(C),
        temperature=tensor(K),
    )
    positions = torch.arange(S, device=device).expand(B, S).contiguous()
    angles = positions.unsqueeze(-1) * torch.rand(ROTATED // 2, device=device)
    halos: list[Tensor | None] = [None, None]
    if chunks:
        halos = [tensor(B, chunks, rows, size) for rows, size in ((2 * TAPS - 2, C), (1, width))]
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
    device: torch.device, vocab: int, dtype: torch.dtype, gradients: bool = True
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    hidden, weight = (
        _tensor(device, rows, D, dtype=dtype).requires_grad_(gradients)
        for rows in (LOSS_TOKENS, vocab)
    )
    labels = torch.arange(LOSS_TOKENS, device=device) % vocab
    leaves = [hidden, weight] if gradients else []
    return lambda backend: [linear_cross_entropy(hidden, weight, labels, backend)], leaves


def _moe_permute(
    device: torch.device, dtype: torch.dtype, identity: bool = True
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    """Tokens without an expert put out themselves (`identity`) or zero."""
    tokens = _tensor(device, B * S, D, dtype=dtype)
    probability = _tensor(device, B * S, dtype=torch.float32)
    choice = torch.arange(B * S, device=device) % CLASSES

    def forward(backend: str) -> Sequence[Tensor]:
        order = sort_by_expert(count_by_expert(choice, E, backend))
        rows, left = gather(tokens, order)
        rest = rest_of(left, order) if identity else None
        return [scatter(rows, order, rest, probability)]

    return forward, [tokens, probability]


def _grouped_mlp(
    device: torch.device, rows: int, dtype: torch.dtype, main: bool = False, width: int = F
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    """With main gradients the pre-activation is made again, too."""
    shapes = (rows, D), (E, 2 * width, D), (E, D, width)
    x, gate_up, down = (_tensor(device, *shape, dtype=dtype) for shape in shapes)
    counts = torch.full((E,), rows // E, device=device)
    sums = None
    if main:
        sums = MainGradients(*(torch.zeros(shape, device=device) for shape in shapes[1:]))

    def forward(backend: str) -> Sequence[Tensor]:
        return [grouped_mlp(x, counts, gate_up, down, backend, recompute=main, main=sums)]

    return forward, [x] if main else [x, gate_up, down]


def _router(
    device: torch.device, dtype: torch.dtype, first: bool = False, again: bool = False
) -> tuple[Callable[[str], Sequence[Tensor]], Sequence[Tensor]]:
    """Of the first layer, or of the last one, made again with the choice that it made before."""
    x = _tensor(device, B, S, D, dtype=dtype)
    previous = None if first else _tensor(device, B, S, R, dtype=torch.float32)
    shapes = [(R, D), (R,), (R,), (R,), (R, R), (R,), (R, R), (R,), (CLASSES, R)]
    weights = RouterWeights(*(_tensor(device, *shape, dtype=dtype) for shape in shapes))
    if first:
        weights = replace(weights, depth_scale=None)
    balancing = torch.zeros(CLASSES, device=device)
    context = RouterContext(balancing, torch.ones(B, S, dtype=torch.bool, device=device), 1e-5)
    if again:
        choice = torch.arange(B * S, device=device).view(B, S) % CLASSES
        context = replace(context, choice=choice, load=balancing)

    def forward(backend: str) -> Sequence[Tensor]:
        routed = router(x, previous, weights, context, backend)
        return [routed.probability] if again else [routed.probability, routed.state]

    leaves = [x, previous, *vars(weights).values()]
    return forward, [leaf for leaf in leaves if leaf is not None]


_BF16, _FP32 = torch.bfloat16, torch.float32
_AMD = ("gfx942", "gfx950")

REGISTRY = (
    Shipped("norm_residual", "fused", partial(_norm_residual, dtype=_BF16)),
    Shipped("norm_residual", "residual", _residual),
    Shipped("norm_residual", "norm", _norm),
    Shipped("norm_residual", "stream", _stream_norm),
    Shipped("norm_residual", "fp32", partial(_norm_residual, dtype=_FP32)),
    Shipped("cca", "whole", partial(_cca, chunks=None, dtype=_BF16)),
    Shipped("cca", "chunks", partial(_cca, chunks=2, dtype=_BF16)),
    # The larger form; sm_90 takes no fp32.
    Shipped("cca", "fp32", partial(_cca, chunks=2, dtype=_FP32), _AMD),
    Shipped("attention", "128", partial(_attention, head_dim=128, dtype=_BF16)),
    Shipped("attention", "64", partial(_attention, head_dim=64, dtype=_BF16)),
    Shipped("attention", "fp32", partial(_attention, head_dim=128, dtype=_FP32)),
    Shipped("router", "bf16", partial(_router, dtype=_BF16)),
    Shipped("router", "first layer", partial(_router, dtype=_BF16, first=True)),
    Shipped("router", "made again", partial(_router, dtype=_BF16, again=True)),
    Shipped("router", "fp32", partial(_router, dtype=_FP32)),
    Shipped("linear_cross_entropy", "262272", partial(_loss, vocab=V, dtype=_BF16)),
    Shipped(
        "linear_cross_entropy",
        "evaluation",
        partial(_loss, vocab=V, dtype=_BF16, gradients=False),
    ),
    # Of the full vocabulary a fp32 weight is over 2 GiB, which is slower to address.
    Shipped("linear_cross_entropy", "fp32", partial(_loss, vocab=65_536, dtype=_FP32)),
    Shipped("moe_permute", "bf16", partial(_moe_permute, dtype=_BF16)),
    Shipped("moe_permute", "zero", partial(_moe_permute, dtype=_BF16, identity=False)),
    Shipped("moe_permute", "fp32", partial(_moe_permute, dtype=_FP32)),
    Shipped("grouped_mlp", "many", partial(_grouped_mlp, rows=B * S, dtype=_BF16)),
    Shipped("grouped_mlp", "main", partial(_grouped_mlp, rows=B * S, dtype=_BF16, main=True)),
    Shipped("grouped_mlp", "few", partial(_grouped_mlp, rows=S, dtype=_BF16)),
    Shipped("grouped_mlp", "few main", partial(_grouped_mlp, rows=S, dtype=_BF16, main=True)),
    # A width of no whole tiles: loads at the edge of a matrix are 16 bytes wide, too.
    Shipped(
        "grouped_mlp", "edge", partial(_grouped_mlp, rows=S, dtype=_BF16, width=1600), _AMD[:1]
    ),
    Shipped("grouped_mlp", "fp32", partial(_grouped_mlp, rows=S, dtype=_FP32)),
    Shipped("newton_schulz", "2:1", partial(_newton_schulz, rows=2 * D, columns=D, dtype=_BF16)),
    Shipped("newton_schulz", "fp32", partial(_newton_schulz, rows=2 * D, columns=D, dtype=_FP32)),
)


def form(launch: Launch) -> Hashable:
    """What the compiler makes other code for: constants, options, and of each argument its type,
    whether there is one and, of a tensor, whether 32 bits address it."""

    def kind(argument: object) -> Hashable:
        if not isinstance(argument, torch.Tensor):
            return type(argument).__name__
        return argument.dtype, argument.numel() * argument.element_size() < 2**31

    options = tuple(sorted(launch.config.options(launch.arch).items()))
    constants = tuple(sorted(launch.keywords.items()))
    return launch.name, constants, options, tuple(kind(x) for x in launch.arguments)


def launches(arch: str) -> list[tuple[str, Launch]]:
    """(case, launch) of every kernel of the registry as made for `arch`, each form once, with the
    first case that has it; the case of a kernel's second form in it ends in 2, and so on."""
    known: set[Hashable] = set()
    found = []
    for shipped in REGISTRY:
        if arch not in shipped.architectures:
            continue
        with recording(arch) as recorded:
            shipped.run("triton", torch.device("meta"))
        numbers: dict[str, int] = {}
        for launch in recorded:
            if form(launch) in known:
                continue
            known.add(form(launch))
            number = numbers[launch.name] = numbers.get(launch.name, 0) + 1
            found.append((shipped.name + (f" {number}" if number > 1 else ""), launch))
    return found
