"""The router in Triton: three kernels forward, eight launches of four kernels backward, no atomics.

Forward: down-projection with bias and depth averaging; RMSNorm and the first layer; activation,
second layer, activation, scores, softmax, biased choice, its probability and the load. Library
products of these shapes may split their sums differently from run to run, which sends tokens
elsewhere; here every sum has one order, so two runs agree bitwise. The load is counted per program
and added in one order.

The MLP is fp32 (the paper's; a rounded score sends a token elsewhere), so its small weights are
widened once and its products take the fp32 matrix instructions. The down-projection, nine tenths
of the operations in bf16, takes the bf16 ones.

Saved for backward: inputs, latent, both pre-activations, probabilities, one number per row. The
weights' gradients are sums over all tokens, split into stretches whose partial sums are stored and
added in one order; norms and activations are made again from what is saved.

Legend: T tokens, D hidden, R router width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.launch import (
    ARCHITECTURES,
    COMPUTE_UNITS,
    Config,
    architecture,
    launch,
    require_one_type,
    require_triton,
)
from zaya_kernels.router.triton_kernels import (
    router_choice,
    router_grad_choice,
    router_grad_state,
    router_grad_weight,
    router_product,
)
from zaya_kernels.router.types import Routed

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.router.types import RouterContext, RouterWeights

_PRODUCT = Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=4, num_stages=2)
_WIDE_PRODUCT = Config({"BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=1)
_ROWS = Config({"BM": 32, "BK": 32}, num_warps=4, num_stages=1)
_GRAD_WEIGHT = replace(_PRODUCT, blocks={"BM": 128, "BN": 128, "BT": 64})
_WIDE_GRAD_WEIGHT = replace(_WIDE_PRODUCT, blocks={"BM": 64, "BN": 64, "BT": 32})
_GRAD_CHOICE = Config({"BM": 64, "BN": 64}, num_warps=4, num_stages=1)


def _everywhere(config: Config, hopper_warps: int) -> dict[str, Config]:
    """One configuration; sm_90 has 255 registers a thread, so it may take more warps."""
    table = dict.fromkeys(ARCHITECTURES, config)
    return {**table, "sm_90": replace(config, num_warps=hopper_warps)}


CONFIGS = {
    "router_product": _everywhere(_PRODUCT, 8),
    "router_product_wide": _everywhere(_WIDE_PRODUCT, 4),
    "router_choice": _everywhere(_ROWS, 8),
    "router_grad_choice": _everywhere(_GRAD_CHOICE, 4),
    "router_grad_state": _everywhere(_ROWS, 8),
    "router_grad_weight": _everywhere(_GRAD_WEIGHT, 4),
    "router_grad_weight_wide": _everywhere(_WIDE_GRAD_WEIGHT, 4),
}
"""`_wide`: products of fp32 numbers."""

SMALLEST = 16
"""Side of the smallest block of a product."""
SPLIT_WAVES = 2
"""Programs of a weight's gradient per compute unit."""


@dataclass(frozen=True)
class _Call:
    """What every launch of one router shares."""

    tokens: int
    hidden: int
    width: int
    classes: int
    arch: str
    wide: bool

    @classmethod
    def of(cls, x: Tensor, weights: RouterWeights) -> _Call:
        width, hidden = weights.down.shape
        wide = x.dtype == torch.float32
        tokens = x.numel() // hidden
        return cls(tokens, hidden, width, weights.out.shape[0], architecture(x.device), wide)

    @property
    def padded_classes(self) -> int:
        return max(SMALLEST, 1 << (self.classes - 1).bit_length())

    def config(self, kernel: str, **sizes: int) -> Config:
        """With blocks that divide the given sizes."""
        config = CONFIGS[kernel][self.arch]
        fitting = {key: min(config.blocks[key], size & -size) for key, size in sizes.items()}
        return replace(config, blocks={**config.blocks, **fitting})

    def blocks(self, config: Config) -> int:
        """Blocks of rows."""
        return -(-self.tokens // config.blocks["BM"])


@dataclass(frozen=True)
class _Extra:
    """What a product does besides; None: nothing."""

    bias: Tensor | None = None
    previous: Tensor | None = None
    scale: Tensor | None = None
    norm: Tensor | None = None
    rstd: Tensor | None = None
    eps: float = 0.0
    z: Tensor | None = None


def _product(
    call: _Call, a: Tensor, weight: Tensor, out: Tensor, extra: _Extra, turned: bool = False
) -> Tensor:
    """out [T, N] = a [T, K] @ weight [N, K].T, or @ weight [K, N] if `turned`."""
    inner, columns = a.shape[-1], out.shape[-1]
    wide = a.dtype == torch.float32
    name = "router_product_wide" if wide else "router_product"
    config = call.config(name, BN=columns, BK=inner)
    grid = (call.blocks(config) * (columns // config.blocks["BN"]),)
    launch(
        router_product, grid, config, a, weight, out,
        extra.bias, extra.previous, extra.scale, extra.norm, extra.rstd, extra.z,
        call.tokens, extra.eps,
        K=inner, N=columns, STEP_K=columns if turned else 1, STEP_N=1 if turned else inner,
        WIDE=wide, NORM=extra.norm is not None, BIAS=extra.bias is not None,
        DEPTH=extra.previous is not None, SLOPE=extra.z is not None,
    )  # fmt: skip
    return out


def _grad_weight(
    call: _Call, grad: Tensor, a: Tensor, extra: _Extra, gelu: bool = False, bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Sums over tokens of grad [T, M] times a [T, N], normalised or activated: [M, N], and of
    grad: [M]."""
    rows, columns = grad.shape[-1], a.shape[-1]
    wide = a.dtype == torch.float32
    name = "router_grad_weight_wide" if wide else "router_grad_weight"
    config = call.config(name, BM=rows, BN=columns)
    block = config.blocks
    tiles = rows // block["BM"] * (columns // block["BN"])
    most = max(1, SPLIT_WAVES * COMPUTE_UNITS[call.arch] // tiles)
    fair = -(-call.tokens // most)
    each = -(-fair // block["BT"]) * block["BT"]
    splits = -(-call.tokens // each)
    pieces = torch.empty(splits, rows, columns, dtype=torch.float32, device=a.device)
    sums = torch.empty(splits, rows, dtype=torch.float32, device=a.device) if bias else None
    launch(
        router_grad_weight, (tiles * splits,), config,
        grad, a, extra.norm, extra.rstd, pieces, sums, call.tokens, splits, each,
        M=rows, N=columns, WIDE=wide, NORM=extra.norm is not None, GELU=gelu, BIAS=bias,
    )  # fmt: skip
    return pieces.sum(dim=0), None if sums is None else sums.sum(dim=0)


class _Router(torch.autograd.Function):
    """Weights are down, its bias, depth scale, norm, fc1, its bias, fc2, its bias, out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        previous: Tensor | None,
        how: tuple[_Call, RouterContext],
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        call, context = how
        down, down_bias, depth_scale, norm, fc1, fc1_bias, fc2, fc2_bias, last = weights
        fc1, fc2, last = (w.float() for w in (fc1, fc2, last) if w is not None)
        new = partial(torch.empty, dtype=torch.float32, device=x.device)
        # What leaves the layer has its own shape: a view would make FSDP's hooks warn.
        batch = x.shape[:-1]
        state, z1, z2 = (new((*batch, call.width)) for _ in range(3))
        rstd, probability = (new(batch) for _ in range(2))
        probabilities = new((*batch, call.classes))
        scale = None if previous is None else depth_scale
        assert down is not None
        _product(call, x, down, state, _Extra(down_bias, previous, scale))
        _product(call, state, fc1, z1, _Extra(fc1_bias, norm=norm, rstd=rstd, eps=context.eps))
        config = call.config("router_choice", BK=call.width)
        given, choice, load = context.choice is not None, context.choice, context.load
        counts = None
        if choice is None:
            choice = torch.empty(batch, dtype=torch.int64, device=x.device)
            counts = torch.empty(
                call.blocks(config), call.padded_classes, dtype=torch.int32, device=x.device
            )
        launch(
            router_choice, (call.blocks(config),), config,
            z1, fc2, fc2_bias, last, context.balancing, context.valid.view(torch.uint8), z2,
            probabilities, choice, probability, counts, call.tokens,
            R=call.width, C=call.classes, CP=call.padded_classes, GIVEN=given,
        )  # fmt: skip
        if counts is not None:
            load = counts.sum(dim=0)[: call.classes].float()
        assert load is not None
        ctx.call = call
        ctx.save_for_backward(x, previous, choice, state, z1, z2, rstd, probabilities, *weights)
        ctx.mark_non_differentiable(choice, load)
        return probability, state, choice, load

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_state: Tensor | None, *unused: Any
    ) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, previous, choice, state, z1, z2, rstd, probabilities, *weights = ctx.saved_tensors
        down, _bias, depth_scale, norm, fc1, _bias1, fc2, _bias2, last = weights
        fc1, fc2, last = (w.float() for w in (fc1, fc2, last))
        own_grad = torch.zeros_like(rstd) if grad is None else grad.contiguous()
        scores, grad_z2 = _grad_choice(call, (probabilities, choice, own_grad, last, z2))
        grad_z1 = _product(call, grad_z2, fc2, torch.empty_like(z1), _Extra(z=z1), turned=True)
        later = None if grad_state is None else grad_state.contiguous()
        scale = None if previous is None else depth_scale
        own, grad_previous, sums = _grad_state(
            call, (grad_z1, fc1, state, rstd, norm, later, previous, scale), x.dtype
        )
        grad_x = _product(call, own, down, torch.empty_like(x), _Extra(), turned=True)
        normed = _Extra(norm=norm, rstd=rstd)
        grad_down, _ = _grad_weight(call, own, x, _Extra())
        grad_fc1, grad_fc1_bias = _grad_weight(call, grad_z1, state, normed, bias=True)
        grad_fc2, grad_fc2_bias = _grad_weight(call, grad_z2, z1, _Extra(), gelu=True, bias=True)
        grad_last, _ = _grad_weight(call, scores, z2, _Extra(), gelu=True)
        found = (
            grad_down, sums[1], None if scale is None else sums[2], sums[0],
            grad_fc1, grad_fc1_bias, grad_fc2, grad_fc2_bias, grad_last[: call.classes],
        )  # fmt: skip
        return grad_x, grad_previous, None, *_in_type(found, weights)


def _in_type(found: tuple[Tensor | None, ...], weights: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients in their weights' types; zeros of a scale that had nothing to scale."""
    return [
        None if w is None else torch.zeros_like(w) if g is None else g.to(w.dtype)
        for g, w in zip(found, weights, strict=True)
    ]


def _grad_choice(call: _Call, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Gradients of the scores [T, CP] and of the second pre-activation [T, R]."""
    config = call.config("router_grad_choice", BN=call.width)
    z2 = arguments[-1]
    scores = torch.empty(call.tokens, call.padded_classes, dtype=torch.float32, device=z2.device)
    grad_z2 = torch.empty_like(z2)
    grid = (call.blocks(config) * (call.width // config.blocks["BN"]),)
    launch(
        router_grad_choice, grid, config, *arguments, scores, grad_z2, call.tokens,
        R=call.width, C=call.classes, CP=call.padded_classes,
    )  # fmt: skip
    return scores, grad_z2


def _grad_state(
    call: _Call, arguments: tuple[Tensor | None, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of the latent [T, R] in `dtype` and of the earlier one, and over all tokens [3, R]
    those of norm, bias and depth scale."""
    config = call.config("router_grad_state", BK=call.width)
    state, later, previous = arguments[2], arguments[5], arguments[6]
    assert state is not None
    own = torch.empty_like(state, dtype=dtype)
    grad_previous = None if previous is None else torch.empty_like(state)
    blocks = call.blocks(config)
    sums = torch.empty(3, blocks, call.width, dtype=torch.float32, device=state.device)
    launch(
        router_grad_state, (blocks,), config, *arguments, own, grad_previous, sums,
        call.tokens, blocks,
        R=call.width, LATER=later is not None, DEPTH=previous is not None,
    )  # fmt: skip
    return own, grad_previous, sums.sum(dim=1)


def router_triton(
    x: Tensor, previous: Tensor | None, weights: RouterWeights, context: RouterContext
) -> Routed:
    """See `zaya_kernels.router.op.router`."""
    values = tuple(vars(weights).values())
    require_triton("router", x, previous, *values)
    require_one_type("router", x, *values)
    if not x.numel():
        raise ValueError(f"kernels.router: triton takes one token or more, not {tuple(x.shape)}")
    width, hidden = weights.down.shape
    if width < SMALLEST or width & (width - 1) or hidden % SMALLEST:
        raise ValueError(
            f"kernels.router: triton takes widths that are powers of two from {SMALLEST} and "
            f"hidden sizes that are multiples of {SMALLEST}, not {width} and {hidden}"
        )
    if weights.depth_scale is None:
        previous = None
    valid = context.valid.contiguous()
    if context.choice is not None:
        context = replace(context, choice=context.choice.contiguous())
    probability, state, choice, load = _Router.apply(
        x.contiguous(),
        None if previous is None else previous.contiguous(),
        (_Call.of(x, weights), replace(context, valid=valid)),
        *values,
    )
    return Routed(choice, probability, state, load)


def traffic(tokens: int, sizes: tuple[int, int, int], arch: str) -> tuple[int, int]:
    """Bytes that the forward moves for `sizes` of hidden, width and classes in bf16 with an earlier
    state, each once per launch, and the fewest: inputs, weights and outputs once."""
    hidden, width, classes = sizes
    call = _Call(tokens, hidden, width, classes, arch, False)
    latent = 4 * tokens * width
    down = 2 * (tokens * hidden + width * hidden + 2 * width) + 2 * latent
    first = 2 * latent + 4 * width * width + 2 * 2 * width + 4 * tokens
    config = call.config("router_choice", BK=width)
    choice = 2 * latent + 4 * (width * width + classes * width + classes) + 2 * width
    choice += tokens * (1 + 4 * classes + 8 + 4) + 4 * call.blocks(config) * call.padded_classes
    weights = width * hidden + 5 * width + 2 * width * width + classes * width
    fewest = 2 * (tokens * hidden + weights) + 2 * latent + tokens * (1 + 8 + 4) + 4 * classes
    return down + first + choice, fewest
