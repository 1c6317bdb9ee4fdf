"""CCA up to the attention core in Triton: one kernel forward, one backward.

The depthwise convolution, the per-head mix and a head's own share of the QK-mean are one linear map
of the last M rows, so their weights are multiplied out beforehand: the kernels see one dense matrix
per head and delay. Fused with it are the means over a group's heads, QK-norm, temperature,
rotation, value shift, document boundaries and halos; nothing between input and output touches
memory. Saved for backward: the inputs alone. The backward makes the rest again and gives input and
weight gradients in one pass.

Arithmetic is fp32. Products of bf16 inputs run on matrix units without losing it: an fp32 operand
enters as the sum of two bf16 numbers (16 of its 24 bits), a bf16 one is exact as it is.

Deterministic: no atomics; weight gradients are summed per program over tokens in order, then over
programs by one reduction.

Legend: B batch, n chunks per row, L tokens per chunk, T rows of a block, H query heads, K KV heads,
G = H / K heads of a group, A = H + K, d head dim, C = A d, M = taps0 + taps1 - 1 delays,
r rotated channels, P programs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.cca.triton_backward import cca_backward
from zaya_kernels.cca.triton_kernels import cca_forward
from zaya_kernels.launch import (
    COMPUTE_UNITS,
    Config,
    architecture,
    launch,
    require_one_type,
    require_triton,
    tensors_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.cca.types import CCAContext, CCAWeights

_FORWARD = Config({"T": 128}, num_warps=8, num_stages=1)
_BACKWARD = Config({"T": 32}, num_warps=4, num_stages=1)

# Every block reads its heads' matrices again (from L2), so blocks are as long as the registers
# allow. The backward keeps taps1 matrices of sums in them: with 64 rows it spills, and with 32 and
# 8 warps, for which AMD has half the registers a lane, too.
CONFIGS = {
    "cca_forward": {
        "gfx942": _FORWARD,
        "gfx950": _FORWARD,
        "sm_90": replace(_FORWARD, blocks={"T": 64}),
    },
    "cca_backward": {
        "gfx942": _BACKWARD,
        "gfx950": _BACKWARD,
        "sm_90": replace(_BACKWARD, num_warps=8),
    },
}
"""bf16."""

_AMD = ("gfx942", "gfx950")
# Numbers of twice the size: half the rows and twice the registers, or the kernels spill.
WIDE_CONFIGS = {
    "cca_forward": dict.fromkeys(_AMD, replace(_FORWARD, blocks={"T": 64})),
    "cca_backward": dict.fromkeys(_AMD, replace(_BACKWARD, blocks={"T": 16}, num_warps=8)),
}
"""fp32. On sm_90, which multiplies no fp32 numbers on its matrix units, a thread would need a stack
of 7 to 10 kB in blocks of any size."""


@dataclass(frozen=True)
class _Plan:
    """What the kernels need besides differentiable tensors."""

    positions: Tensor
    """[B, S] int64."""
    cos: Tensor
    """[B, S, r / 2] fp32."""
    sin: Tensor
    query_heads: int
    kv_heads: int
    chunks: int
    taps: tuple[int, int]

    @property
    def reach(self) -> int:
        """Rows before a token that reach it."""
        return sum(self.taps) - 2

    def constants(self, qk: Tensor, halo: Tensor | None) -> dict[str, Any]:
        heads = self.query_heads + self.kv_heads
        return {
            "H": self.query_heads,
            "K": self.kv_heads,
            "D": qk.shape[-1] // heads,
            "HALF": self.cos.shape[-1],
            "PARTS": _parts(qk),
            "HALO": halo is not None,
            "HALO_ROWS": 0 if halo is None else halo.shape[2],
        }

    def walk(self, qk: Tensor, rows: int) -> tuple[int, int, int]:
        """Chunk length, chunks in all, blocks of `rows` rows per chunk."""
        batch, sequence, _ = qk.shape
        length = sequence // self.chunks
        return length, batch * self.chunks, -(-length // rows)


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """A pointer for an argument that the constant HALO says is not read."""
    return instead if tensor is None else tensor


def _config(kernel: str, qk: Tensor) -> Config:
    tables = WIDE_CONFIGS if qk.dtype == torch.float32 else CONFIGS
    return tables[kernel][architecture(qk.device)]


def _parts(qk: Tensor) -> int:
    """bf16 numbers that an fp32 operand of a matrix product is written as; 1: plain fp32."""
    return 2 if qk.dtype == torch.bfloat16 else 1


@dataclass(frozen=True)
class _Matrices:
    """Weights in the order the kernels read them."""

    depthwise: Tensor
    """[taps0, C] fp32, newest tap first."""
    grouped: Tensor
    """[A, taps1, d_out, d_in], newest tap first, in the inputs' type."""
    constant: Tensor
    """[A, d] fp32: what the biases add."""

    @classmethod
    def of(cls, weights: CCAWeights) -> _Matrices:
        heads, size, fan_in = weights.grouped.shape
        grouped = weights.grouped.view(heads, size, size, fan_in // size)
        bias = weights.depthwise_bias.float()
        constant = weights.grouped_bias.float().view(heads, size)
        return cls(
            depthwise=weights.depthwise.float().flip(1).t().contiguous(),
            grouped=grouped.flip(3).permute(0, 3, 1, 2).contiguous(),
            constant=constant + (grouped.float() * bias.view(heads, 1, size, 1)).sum(dim=(2, 3)),
        )


def _multiplied_out(depthwise: Tensor, grouped: Tensor, parts: int) -> Tensor:
    """[parts, A, M, d_out, d_in]: matrices by delay as fp32, or as two bf16 numbers each.

    The own share of the QK-mean, half of the input, is part of delay 0.
    """
    heads, taps1, size, _ = grouped.shape
    taps0 = len(depthwise)
    columns = depthwise.view(taps0, heads, 1, size)
    weight = torch.zeros(heads, taps0 + taps1 - 1, size, size, device=grouped.device)
    weight[:, 0].diagonal(dim1=1, dim2=2).fill_(0.5)
    for back in range(taps0):
        for delay in range(taps1):
            weight[:, back + delay] += grouped[:, delay] * columns[back]
    if parts == 1:
        return weight.unsqueeze(0)
    high = weight.to(torch.bfloat16)
    return torch.stack([high, (weight - high.float()).to(torch.bfloat16)])


class _CCA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v_now: Tensor,
        v_delayed: Tensor,
        halo_qk: Tensor | None,
        halo_v: Tensor | None,
        depthwise: Tensor,
        grouped: Tensor,
        constant: Tensor,
        temperature: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights as in `_Matrices`."""
        batch, sequence, _ = qk.shape
        constants = plan.constants(qk, halo_qk)
        config = _config("cca_forward", qk)
        length, chunks, blocks = plan.walk(qk, config.blocks["T"])
        size = constants["D"]
        q = torch.empty(batch, sequence, plan.query_heads, size, dtype=qk.dtype, device=qk.device)
        k, v = (
            torch.empty(batch, sequence, plan.kv_heads, size, dtype=x.dtype, device=qk.device)
            for x in (qk, v_now)
        )
        weight = _multiplied_out(depthwise, grouped, constants["PARTS"])
        launch(
            cca_forward, (plan.kv_heads, blocks, chunks), config,
            qk, v_now, v_delayed, _or(halo_qk, qk), _or(halo_v, qk),
            plan.positions, plan.cos, plan.sin, weight, constant, temperature, q, k, v,
            length, plan.chunks, qk.stride(0), qk.stride(1), v_now.stride(0), v_now.stride(1),
            TAPS=plan.reach + 1, **constants,
        )  # fmt: skip
        ctx.save_for_backward(
            qk, halo_qk, halo_v, weight, constant, temperature, depthwise, grouped
        )
        ctx.plan = plan
        return q, k, v

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        qk, halo_qk, halo_v, *weights, grouped = ctx.saved_tensors
        temperature = weights[2]
        plan: _Plan = ctx.plan
        walk = _Walk.of(qk, halo_qk, plan)
        inputs = _input_gradients(qk, halo_qk, halo_v, grad_v)
        sums = walk.partial_sums(qk.device)
        grads = (grad.contiguous() for grad in (grad_q, grad_k, grad_v))
        launch(
            cca_backward, (walk.programs,), walk.config,
            qk, _or(halo_qk, qk), plan.positions, plan.cos, plan.sin,
            *weights, grouped.mT.contiguous(),
            *grads, *(_or(x, qk) for x in inputs), *sums,
            walk.length, plan.chunks, walk.per_chunk, walk.blocks, walk.key_splits,
            walk.query_splits, qk.stride(0), qk.stride(1),
            TAPS0=plan.taps[0], TAPS1=plan.taps[1], LEAD=walk.lead, **walk.constants,
        )  # fmt: skip
        grad_grouped, grad_depthwise, grad_constant = (walk.by_head(x) for x in sums[:3])
        return (
            *inputs,
            grad_depthwise.transpose(0, 1).flatten(1),
            grad_grouped.to(grouped.dtype),
            grad_constant,
            sums[3].view(walk.key_splits, -1).sum(dim=0).to(temperature.dtype),
            None,
        )


def _input_gradients(
    qk: Tensor, halo_qk: Tensor | None, halo_v: Tensor | None, grad_v: Tensor
) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of qk, v_now, v_delayed and both halos."""
    grad_qk = torch.empty_like(qk, memory_format=torch.contiguous_format)
    shape = (*qk.shape[:2], grad_v.shape[2] * grad_v.shape[3] // 2)
    now, late = (torch.empty(shape, dtype=grad_v.dtype, device=qk.device) for _ in range(2))
    # Only the last rows of a longer halo are read; the others' gradient is zero.
    halos = (None if halo is None else torch.zeros_like(halo) for halo in (halo_qk, halo_v))
    return grad_qk, now, late, *halos


@dataclass(frozen=True)
class _Walk:
    """How the backward deals blocks of rows to programs, first the keys' and then the queries'."""

    constants: dict[str, Any]
    taps: tuple[int, int]
    config: Config
    length: int
    lead: int
    """Rows before a chunk that get gradients."""
    per_chunk: int
    blocks: int
    key_splits: int
    query_splits: int

    @classmethod
    def of(cls, qk: Tensor, halo: Tensor | None, plan: _Plan) -> _Walk:
        arch = architecture(qk.device)
        config = _config("cca_backward", qk)
        lead = 0 if halo is None else max(plan.reach, 1)
        rows = config.blocks["T"] - plan.reach
        length, chunks, _ = plan.walk(qk, rows)
        per_chunk = -(-(length + lead) // rows)
        blocks = chunks * per_chunk
        splits = program_splits(blocks, plan.query_heads, plan.kv_heads, plan.taps, arch)
        constants = plan.constants(qk, halo)
        return cls(constants, plan.taps, config, length, lead, per_chunk, blocks, *splits)

    @property
    def programs(self) -> int:
        return self.key_splits * self.constants["K"] + self.query_splits * self.constants["H"]

    def partial_sums(self, device: torch.device) -> list[Tensor]:
        """[P, taps1, d, d], [P, taps0, d], [P, d] and, of the keys' programs, one number each."""
        size, keys = self.constants["D"], self.key_splits * self.constants["K"]
        shapes: list[tuple[int, ...]] = [
            (self.programs, self.taps[1], size, size),
            (self.programs, self.taps[0], size),
            (self.programs, size),
            (keys,),
        ]
        return [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]

    def by_head(self, sums: Tensor) -> Tensor:
        """Sums [P, ...] of programs to [A, ...] of heads, queries first."""
        keys = self.key_splits * self.constants["K"]
        of_keys = sums[:keys].unflatten(0, (self.key_splits, -1)).sum(dim=0)
        of_queries = sums[keys:].unflatten(0, (self.query_splits, -1)).sum(dim=0)
        return torch.cat([of_queries, of_keys])


def program_splits(
    blocks: int, query_heads: int, kv_heads: int, taps: tuple[int, int], arch: str
) -> tuple[int, int]:
    """Parts that the blocks of a key and of a query head are dealt into: about one program per
    compute unit in all, each with as many products.

    A block of rows is multiplied by one matrix per delay for every head whose gradient it takes,
    the own key's twice (both parts); by two per tap for the input's gradient and three for the
    weights'.
    """
    delays, both = sum(taps) - 1, 5 * taps[1]
    key = (2 + query_heads // kv_heads) * delays + both
    query = 2 * delays + both
    unit = COMPUTE_UNITS[arch] / (kv_heads * key + query_heads * query)
    key_splits, query_splits = (max(1, min(blocks, int(unit * cost))) for cost in (key, query))
    return key_splits, query_splits


def cca_triton(
    qk: Tensor, v_now: Tensor, v_delayed: Tensor, weights: CCAWeights, context: CCAContext
) -> tuple[Tensor, Tensor, Tensor]:
    """See `zaya_kernels.cca.op.cca`."""
    halos = (context.halo_qk, context.halo_v)
    require_triton("cca", qk, v_now, v_delayed, *halos, *tensors_of(weights))
    kv_heads = weights.temperature.shape[0]
    size = weights.grouped.shape[1]
    _require_shape(size, context.cos.shape[-1])
    require_one_type("cca", qk, weights.grouped)
    arch = architecture(qk.device)
    if qk.dtype == torch.float32 and arch not in WIDE_CONFIGS["cca_forward"]:
        raise ValueError(
            f"kernels.cca: triton takes bf16 on {arch}, whose matrix units multiply no fp32 "
            "numbers; choose eager"
        )
    matrices = _Matrices.of(weights)
    plan = _Plan(
        positions=context.positions.contiguous(),
        cos=context.cos.contiguous(),
        sin=context.sin.contiguous(),
        query_heads=context.num_query_heads,
        kv_heads=kv_heads,
        chunks=1 if context.halo_qk is None else context.halo_qk.shape[1],
        taps=(weights.depthwise.shape[1], weights.grouped.shape[2] // size),
    )
    qk, v_now, v_delayed = (_with_unit_stride(x) for x in (qk, v_now, v_delayed))
    if v_now.stride() != v_delayed.stride():
        v_now, v_delayed = v_now.contiguous(), v_delayed.contiguous()
    halo_qk, halo_v = (None if halo is None else halo.contiguous() for halo in halos)
    q, k, v = _CCA.apply(
        qk, v_now, v_delayed, halo_qk, halo_v,
        matrices.depthwise, matrices.grouped, matrices.constant, weights.temperature, plan,
    )  # fmt: skip
    return q, k, v


def _with_unit_stride(x: Tensor) -> Tensor:
    """Slices of a product's rows are read where they lie; anything else is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _require_shape(head_dim: int, half: int) -> None:
    if head_dim < 32 or head_dim & (head_dim - 1):
        raise ValueError(
            f"kernels.cca: triton takes head dims that are powers of two from 32, not {head_dim}"
        )
    if half % 8:
        raise ValueError(
            f"kernels.cca: triton takes rotations of a multiple of 16 channels, not {2 * half}"
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes that the kernels move in one forward or backward, each byte once per launch."""

    by_kernel: dict[str, int]
    afterwards: int
    """Partial weight gradients read again by the sum over programs."""
    fewest: int
    """Every input read once, every output written once."""

    @property
    def ratio(self) -> float:
        return (sum(self.by_kernel.values()) + self.afterwards) / self.fewest


def traffic(
    shape: tuple[int, int, int, int, int, int], taps: tuple[int, int], arch: str
) -> list[Traffic]:
    """Forward and backward in bf16 without halos, for (B, S, H, K, d, r).

    Multiplying out the weights is not counted; it does not grow with the tokens.
    """
    batch, sequence, query_heads, kv_heads, size, rotated = shape
    tokens, heads = batch * sequence, query_heads + kv_heads
    wide, values = 2 * tokens * heads * size, 2 * tokens * kv_heads * size
    places = tokens * (8 + 4 * rotated)
    body = places + 4 * heads * size + 2 * kv_heads
    matrix = 2 * (sum(taps) - 1) * size**2
    forward = 2 * wide + 2 * values + body + 2 * heads * matrix
    rows = CONFIGS["cca_backward"][arch].blocks["T"] - (sum(taps) - 2)
    blocks = batch * -(-sequence // rows)
    splits = program_splits(blocks, query_heads, kv_heads, taps, arch)
    programs = splits[0] * kv_heads + splits[1] * query_heads
    partial = 4 * programs * size * (taps[1] * size + taps[0] + 1) + 4 * splits[0] * kv_heads
    # Queries are made again from the high parts alone.
    again = (query_heads + 2 * kv_heads) * matrix
    convolutions = heads * size * (2 * taps[1] * size + 4 * taps[0])
    backward = 3 * wide + 2 * values + body + again + convolutions + partial
    weights = 2 * heads * size * (taps[1] * size + taps[0] + 2) + 2 * kv_heads
    fewest = places + weights + 2 * values
    return [
        Traffic({"cca_forward": forward}, 0, 2 * wide + fewest),
        Traffic({"cca_backward": backward}, partial, 3 * wide + fewest + weights),
    ]
