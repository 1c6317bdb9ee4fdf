"""CCA up to the attention core in Triton: one kernel forward, two backward.

The depthwise convolution, the per-head mix and a head's own share of the QK-mean are one linear map
of the last `TAPS` rows, so their weights are multiplied out beforehand (a few small torch products,
which autograd differentiates): the kernels see one dense tap matrix per head and delay. Fused with
it are the means over a group's heads, QK-norm, temperature, rotation, value shift, document
boundaries and halos; nothing between input and output touches memory. Saved for backward: the
inputs alone.

Arithmetic is fp32. Products of bf16 inputs run on matrix units without losing it: an fp32 operand
enters as the sum of two bf16 numbers (16 of its 24 bits), the bf16 input is exact as it is.

Deterministic: no atomics; weight gradients are summed per program over tokens in order, then over
programs by one reduction.

Legend: B batch, n chunks per row, L tokens per chunk, T rows of a block, H query heads, K KV heads,
G = H / K heads of a group, A = H + K, d head dim, C = A d, M taps, r rotated channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.cca.triton_kernels import (
    cca_backward_inputs,
    cca_backward_weights,
    cca_forward,
)
from zaya_kernels.launch import (
    COMPUTE_UNITS,
    Config,
    architecture,
    launch,
    require_triton,
    tensors_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.cca.types import CCAContext, CCAWeights

_FORWARD = Config({"T": 128}, num_warps=8, num_stages=1)
_INPUTS = Config({"T": 32}, num_warps=4, num_stages=1)
_WEIGHTS = Config({"T": 32}, num_warps=8, num_stages=1)

# Every block reads its heads' tap matrices again (from L2), so forward blocks are as long as the
# registers allow. The weight kernel keeps three tap matrices of sums in registers: with 64 rows, or
# fewer warps, it spills.
CONFIGS = {
    "cca_forward": {
        "gfx942": _FORWARD,
        "gfx950": _FORWARD,
        "sm_90": replace(_FORWARD, blocks={"T": 64}),
    },
    "cca_backward_inputs": {
        "gfx942": _INPUTS,
        "gfx950": _INPUTS,
        "sm_90": replace(_INPUTS, num_warps=8),
    },
    "cca_backward_weights": dict.fromkeys(COMPUTE_UNITS, _WEIGHTS),
}


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
    taps: int

    def constants(self, qk: Tensor, halo: Tensor | None) -> dict[str, Any]:
        heads = self.query_heads + self.kv_heads
        return {
            "H": self.query_heads,
            "K": self.kv_heads,
            "D": qk.shape[-1] // heads,
            "HALF": self.cos.shape[-1],
            "TAPS": self.taps,
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


def _parts(qk: Tensor) -> int:
    """bf16 numbers that an fp32 operand of a matrix product is written as; 1: plain fp32."""
    return 2 if qk.dtype == torch.bfloat16 else 1


def _split(weight: Tensor, parts: int) -> Tensor:
    """fp32 [...] -> [parts, ...]: itself, or the two bf16 numbers whose sum it nearly is."""
    if parts == 1:
        return weight.unsqueeze(0).contiguous()
    high = weight.to(torch.bfloat16)
    return torch.stack([high, (weight - high.float()).to(torch.bfloat16)])


class _CCA(torch.autograd.Function):
    """Kernels over multiplied-out weights: weight [A, M, d_out, d_in], constant [A, d], fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v_now: Tensor,
        v_delayed: Tensor,
        halo_qk: Tensor | None,
        halo_v: Tensor | None,
        weight: Tensor,
        constant: Tensor,
        temperature: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, sequence, _ = qk.shape
        constants = plan.constants(qk, halo_qk)
        config = CONFIGS["cca_forward"][architecture(qk.device)]
        length, chunks, blocks = plan.walk(qk, config.blocks["T"])
        size = constants["D"]
        q = torch.empty(batch, sequence, plan.query_heads, size, dtype=qk.dtype, device=qk.device)
        k, v = (
            torch.empty(batch, sequence, plan.kv_heads, size, dtype=x.dtype, device=qk.device)
            for x in (qk, v_now)
        )
        split = _split(weight, constants["PARTS"])
        launch(
            cca_forward, (plan.kv_heads, blocks, chunks), config,
            qk, v_now, v_delayed, _or(halo_qk, qk), _or(halo_v, qk),
            plan.positions, plan.cos, plan.sin, split, constant, temperature, q, k, v,
            length, plan.chunks, qk.stride(0), qk.stride(1), v_now.stride(0), v_now.stride(1),
            **constants,
        )  # fmt: skip
        ctx.save_for_backward(qk, halo_qk, halo_v, split, constant, temperature)
        ctx.plan = plan
        return q, k, v

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        qk, halo_qk, halo_v, split, constant, temperature = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grads = tuple(grad.contiguous() for grad in (grad_q, grad_k, grad_v))
        common = (qk, halo_qk, plan.positions, plan.cos, plan.sin, split, constant, temperature)
        inputs = _inputs_backward(common, grads, halo_v, plan)
        weights = _weights_backward(common, grads, plan)
        return *inputs[:-1], *weights, inputs[-1], None


def _inputs_backward(
    common: tuple[Any, ...], grads: tuple[Tensor, ...], halo_v: Tensor | None, plan: _Plan
) -> tuple[Tensor | None, ...]:
    """Gradients of qk, v_now, v_delayed, both halos and the temperature."""
    qk, halo_qk, split, temperature = common[0], common[1], common[5], common[7]
    batch, sequence, _ = qk.shape
    constants = plan.constants(qk, halo_qk)
    config = CONFIGS["cca_backward_inputs"][architecture(qk.device)]
    lead = 0 if halo_qk is None else max(plan.taps - 1, 1)
    rows = config.blocks["T"] - (plan.taps - 1)
    length, chunks, _ = plan.walk(qk, rows)
    blocks = -(-(length + lead) // rows)
    grad_qk = torch.empty_like(qk, memory_format=torch.contiguous_format)
    width = plan.kv_heads * constants["D"] // 2
    grad_now, grad_delayed = (
        torch.empty(batch, sequence, width, dtype=grads[2].dtype, device=qk.device)
        for _ in range(2)
    )
    # Only the last rows of a longer halo are read; the others' gradient is zero.
    grad_halo_qk = None if halo_qk is None else torch.zeros_like(halo_qk)
    grad_halo_v = None if halo_v is None else torch.zeros_like(halo_v)
    shares = torch.empty(chunks * blocks, plan.kv_heads, dtype=torch.float32, device=qk.device)
    launch(
        cca_backward_inputs, (plan.kv_heads, blocks, chunks), config,
        qk, _or(halo_qk, qk), *common[2:], split.mT.contiguous(), *grads,
        grad_qk, grad_now, grad_delayed,
        _or(grad_halo_qk, qk), _or(grad_halo_v, qk), shares, length,
        plan.chunks, blocks, qk.stride(0), qk.stride(1), LEAD=lead, **constants,
    )  # fmt: skip
    grad_temperature = shares.sum(dim=0).to(temperature.dtype)
    return grad_qk, grad_now, grad_delayed, grad_halo_qk, grad_halo_v, grad_temperature


def _weights_backward(
    common: tuple[Any, ...], grads: tuple[Tensor, ...], plan: _Plan
) -> tuple[Tensor, ...]:
    """Gradients of the tap matrices and of the constant."""
    qk, halo_qk = common[:2]
    constants = plan.constants(qk, halo_qk)
    arch = architecture(qk.device)
    config = CONFIGS["cca_backward_weights"][arch]
    length, chunks, per_chunk = plan.walk(qk, config.blocks["T"])
    heads, size = plan.query_heads + plan.kv_heads, constants["D"]
    splits = weight_splits(chunks * per_chunk, heads, arch)
    new = {"dtype": torch.float32, "device": qk.device}
    grad_weight = torch.empty(splits, heads, plan.taps, size, size, **new)
    grad_constant = torch.empty(splits, heads, size, **new)
    launch(
        cca_backward_weights, (heads, splits), config,
        qk, _or(halo_qk, qk), *common[2:], *grads[:2], grad_weight, grad_constant,
        length, plan.chunks, chunks * per_chunk, splits, qk.stride(0), qk.stride(1), **constants,
    )  # fmt: skip
    return grad_weight.sum(dim=0), grad_constant.sum(dim=0)


def weight_splits(blocks: int, heads: int, arch: str) -> int:
    """Parts that the tokens are dealt into for the weight gradients: one program per compute unit
    over all heads, at most one per block."""
    return max(1, min(blocks, COMPUTE_UNITS[arch] // heads))


def _multiplied_out(weights: CCAWeights) -> tuple[Tensor, Tensor]:
    """Tap matrices [A, M, d_out, d_in] by delay, and what the biases add [A, d]; fp32.

    The own share of the QK-mean, half of the input, is part of delay 0.
    """
    heads, size, fan_in = weights.grouped.shape
    taps0, taps1 = weights.depthwise.shape[1], fan_in // size
    depthwise = weights.depthwise.float().view(heads, size, taps0).flip(2)
    grouped = weights.grouped.float().view(heads, size, size, taps1).flip(3)
    bias = weights.depthwise_bias.float().view(heads, 1, size, 1)
    taps = []
    for back in range(taps0 + taps1 - 1):
        pairs = [(j, back - j) for j in range(taps1) if 0 <= back - j < taps0]
        products = [grouped[..., j] * depthwise[:, None, :, i] for j, i in pairs]
        taps.append(torch.stack(products).sum(dim=0))
    own = torch.eye(size, device=grouped.device).expand(heads, size, size)
    taps[0] = taps[0] + 0.5 * own
    constant = weights.grouped_bias.float().view(heads, size) + (grouped * bias).sum(dim=(2, 3))
    return torch.stack(taps, dim=1), constant


def cca_triton(
    qk: Tensor, v_now: Tensor, v_delayed: Tensor, weights: CCAWeights, context: CCAContext
) -> tuple[Tensor, Tensor, Tensor]:
    """See `zaya_kernels.cca.op.cca`."""
    halos = (context.halo_qk, context.halo_v)
    require_triton("cca", qk, v_now, v_delayed, *halos, *tensors_of(weights))
    kv_heads = weights.temperature.shape[0]
    size = weights.grouped.shape[1]
    _require_shape(size, context.cos.shape[-1])
    weight, constant = _multiplied_out(weights)
    plan = _Plan(
        positions=context.positions.contiguous(),
        cos=context.cos.contiguous(),
        sin=context.sin.contiguous(),
        query_heads=context.num_query_heads,
        kv_heads=kv_heads,
        chunks=1 if context.halo_qk is None else context.halo_qk.shape[1],
        taps=weight.shape[1],
    )
    qk, v_now, v_delayed = (_with_unit_stride(x) for x in (qk, v_now, v_delayed))
    if v_now.stride() != v_delayed.stride():
        v_now, v_delayed = v_now.contiguous(), v_delayed.contiguous()
    halo_qk, halo_v = (None if halo is None else halo.contiguous() for halo in halos)
    q, k, v = _CCA.apply(
        qk, v_now, v_delayed, halo_qk, halo_v, weight, constant, weights.temperature, plan
    )
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


def traffic(shape: tuple[int, int, int, int, int, int], taps: int, arch: str) -> list[Traffic]:
    """Forward and backward in bf16 without halos, for (B, S, H, K, d, r).

    Multiplying out the weights is not counted; it does not grow with the tokens.
    """
    batch, sequence, query_heads, kv_heads, size, rotated = shape
    tokens, heads = batch * sequence, query_heads + kv_heads
    wide, values = 2 * tokens * heads * size, 2 * tokens * kv_heads * size
    places = tokens * (8 + 4 * rotated)
    taps_bytes = 2 * heads * taps * size**2
    vectors = 4 * heads * size + 2 * kv_heads
    forward = 2 * wide + 2 * values + places + vectors + 2 * taps_bytes
    rows = CONFIGS["cca_backward_inputs"][arch].blocks["T"] - (taps - 1)
    blocks = batch * -(-sequence // rows)
    # Queries are made again from the high parts alone.
    again = 2 * taps * size**2 * (query_heads + 2 * kv_heads)
    shares = 4 * blocks * kv_heads
    inputs = 3 * wide + 2 * values + places + vectors + again + 2 * taps_bytes + shares
    rows = CONFIGS["cca_backward_weights"][arch].blocks["T"]
    splits = weight_splits(batch * -(-sequence // rows), heads, arch)
    partial = splits * heads * 4 * (taps * size**2 + size)
    weights = 2 * wide + places + vectors + taps_bytes + partial
    fewest = 3 * wide + 2 * values + places + vectors + 2 * taps_bytes
    return [
        Traffic({"cca_forward": forward}, 0, 2 * wide + 2 * values + places + vectors + taps_bytes),
        Traffic({"cca_backward_inputs": inputs, "cca_backward_weights": weights}, partial, fewest),
    ]
