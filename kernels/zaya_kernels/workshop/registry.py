"""The shipped kernels at the shapes they are tuned for: what is compiled, counted and timed.

Shapes are one layer of ZAYA1-8B (arXiv 2605.05365) on 8 sequences of 4,096 tokens.

Legend: B batch, S sequence, D hidden, H query heads, K KV heads, d head dim, C = (H + K) d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zaya_kernels.attention.op import attention
from zaya_kernels.attention.segments import Segment, plan_attention
from zaya_kernels.cca.op import CCAContext, CCAWeights, Projections, cca
from zaya_kernels.launch import Launch, recording
from zaya_kernels.newton_schulz.op import newton_schulz
from zaya_kernels.norm_residual.op import ResidualScales, residual, residual_norm, rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

B, S, D, H, K, HEAD_DIM, TAPS, ROTATED = 8, 4096, 2048, 8, 2, 128, 2, 64
C = (H + K) * HEAD_DIM
EXPERTS = 16


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
    matrices = _tensor(device, EXPERTS, rows, columns, dtype=torch.float32).detach()
    return lambda backend: [newton_schulz(matrices, 5, dtype, backend)], []


REGISTRY = (
    Shipped("norm_residual", "fused", _norm_residual),
    Shipped("norm_residual", "residual", _residual),
    Shipped("norm_residual", "norm", _norm),
    Shipped("cca", "whole", lambda device: _cca(device, None)),
    Shipped("cca", "chunks", lambda device: _cca(device, 2)),
    Shipped("attention", "128", lambda device: _attention(device, 128, torch.bfloat16)),
    Shipped("attention", "64", lambda device: _attention(device, 64, torch.bfloat16)),
    Shipped("attention", "fp32", lambda device: _attention(device, 128, torch.float32)),
    Shipped("newton_schulz", "2:1", lambda d: _newton_schulz(d, 2 * D, D, torch.bfloat16)),
    Shipped("newton_schulz", "fp32", lambda d: _newton_schulz(d, 2 * D, D, torch.float32)),
)


def launches(arch: str) -> list[tuple[str, Launch]]:
    """(case, launch) of every kernel of the registry as made for `arch`. Launches that compile to
    the same code count once; a kernel's second form in a case is numbered."""
    found = []
    for shipped in REGISTRY:
        with recording(arch) as recorded:
            shipped.run("triton", torch.device("meta"))
        forms: dict[str, list[object]] = {}
        for launch in recorded:
            known = forms.setdefault(launch.name, [])
            if (form := _form(launch)) not in known:
                known.append(form)
                number = f" #{len(known)}" if len(known) > 1 else ""
                found.append((shipped.name + number, launch))
    return found


def _form(launch: Launch) -> object:
    """What two launches of one kernel share if they do the same work on other tensors."""
    arguments = [(x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in launch.arguments]
    return arguments, launch.config, dict(launch.keywords)
