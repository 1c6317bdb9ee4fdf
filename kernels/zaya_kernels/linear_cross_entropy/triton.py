"""LM head and cross-entropy in Triton: three products a chunk of tokens, none of them twice.

A chunk's logits are made once and leave their product's registers as probabilities relative to the
largest of their block; they are rounded to fp16 there (relative error 2^-11 down to 6e-5 of the
largest, 2^-25 of the largest below), in fp32 for fp32 inputs. One pass over them takes the rows'
sums together, gives the loss, and turns the probabilities in place into the gradient of the logits,
bf16 like the operands of the two products that follow. Logits, sums, loss and all accumulation are
fp32, and products of bf16 numbers are exact in it (fp32 LM head; arXiv 2605.05365, II-A).
Unsupervised tokens are dropped first.

The weight's gradient is a sum over chunks. A bf16 one cannot hold it and a fp32 copy of it takes
2 GiB, so between chunks it has 24 bits: its own 16, and 8 beside it (`low`). After 32 chunks the
error is 3e-5 of the sum, a fiftieth of what rounding the result to bf16 costs. The hidden
states' gradient is a sum over all classes, split over programs: partial sums are stored and added
in one order. No atomics: two runs agree bitwise.

Gradients are made in the forward pass, while the probabilities are there; the backward pass only
scales them, in fp32, and rounds once.

Legend: T tokens, R rows of a chunk, V classes, W width of the scores, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.launch import (
    ARCHITECTURES,
    CHIPLETS,
    COMPUTE_UNITS,
    Config,
    architecture,
    launch,
    require_one_type,
    require_triton,
)
from zaya_kernels.linear_cross_entropy.triton_kernels import (
    loss_finish,
    loss_grad_hidden,
    loss_grad_weight,
    loss_gradient,
    loss_scores,
)

if TYPE_CHECKING:
    from torch import Tensor

_PRODUCT = Config({"BM": 256, "BN": 256, "BK": 32}, num_warps=8, num_stages=2)
_HOPPER = replace(_PRODUCT, blocks={"BM": 128, "BN": 256, "BK": 64}, num_stages=3)
_HOPPER_SCORES = replace(_HOPPER, blocks={"BM": 128, "BN": 128, "BK": 64})
# 256 columns would leave no registers for the exponentials.
_SCORES = replace(_PRODUCT, blocks={"BM": 256, "BN": 128, "BK": 64})
_AMD = {"gfx942": _PRODUCT, "gfx950": _PRODUCT}
CONFIGS = {
    "loss_scores": {"gfx942": _SCORES, "gfx950": _SCORES, "sm_90": _HOPPER_SCORES},
    "loss_grad_hidden": {**_AMD, "sm_90": _HOPPER},
    "loss_grad_weight": {**_AMD, "sm_90": _HOPPER},
    "loss_gradient": dict.fromkeys(ARCHITECTURES, Config({"BT": 32}, num_warps=8, num_stages=1)),
    "loss_finish": dict.fromkeys(ARCHITECTURES, Config({"BLOCK": 4096}, num_warps=4)),
}
"""bf16; of a chunk's rows every BM is a divisor, of the scores' width every BN and BK."""

_WIDE_PRODUCT = Config({"BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=1)
WIDE_CONFIGS = {
    name: table if "BM" not in table["gfx942"].blocks else dict.fromkeys(table, _WIDE_PRODUCT)
    for name, table in CONFIGS.items()
}
"""fp32."""

SCORE_BYTES = 257 * 2**20
"""Most that a chunk's probabilities take (V = 262,272 in bf16: 512 rows)."""
SMALLEST = 16
"""Side of the smallest block of a product."""


@dataclass(frozen=True)
class _Call:
    """What every launch of one loss shares."""

    vocab: int
    columns: int
    wide: bool
    arch: str

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> _Call:
        wide = hidden.dtype.itemsize == 4
        return cls(weight.shape[0], weight.shape[1], wide, architecture(hidden.device))

    def config(self, kernel: str) -> Config:
        """With blocks that divide the hidden size."""
        config = (WIDE_CONFIGS if self.wide else CONFIGS)[kernel][self.arch]
        along = {"loss_scores": "BK", "loss_grad_hidden": "BN", "loss_grad_weight": "BN"}.get(
            kernel
        )
        if along is None:
            return config
        divisor = self.columns & -self.columns
        return replace(config, blocks={**config.blocks, along: min(config.blocks[along], divisor)})

    @property
    def tile(self) -> int:
        """Columns of scores that share one maximum."""
        return self.config("loss_scores").blocks["BN"]

    @property
    def tiles(self) -> int:
        return -(-self.vocab // self.tile)

    @property
    def width(self) -> int:
        """Elements from row to row of the scores: whole blocks of both kernels that walk them."""
        block = max(self.tile, self.config("loss_grad_weight").blocks["BM"])
        return -(-self.vocab // block) * block

    @property
    def block_rows(self) -> int:
        """What a chunk's rows are a multiple of."""
        blocks = [self.config(name).blocks for name in ("loss_scores", "loss_grad_hidden")]
        return max(*(b["BM"] for b in blocks), self.config("loss_grad_weight").blocks["BK"])

    @property
    def chunk_rows(self) -> int:
        most = SCORE_BYTES // (self.width * (4 if self.wide else 2))
        return max(1, most // self.block_rows) * self.block_rows

    def splits(self, rows: int) -> tuple[int, int]:
        """Into how many sums the hidden states' gradient is split, and classes of each."""
        blocks = self.config("loss_grad_hidden").blocks
        tiles = rows // blocks["BM"] * (self.columns // blocks["BN"])
        steps = -(-self.vocab // blocks["BK"])
        # As many sums as keep every compute unit busy, each of whole steps.
        each = -(-steps // max(1, COMPUTE_UNITS[self.arch] // tiles)) * blocks["BK"]
        return -(-self.vocab // each), each

    @property
    def constants(self) -> dict[str, Any]:
        return {"D": self.columns, "XCDS": CHIPLETS[self.arch]}


@dataclass
class _Gradients:
    """Sums over the chunks so far."""

    rows: Tensor
    """[kept, D] fp32."""
    weight: Tensor
    """[V, D] in the weight's type; with `low` its upper 16 bits."""
    low: Tensor | None
    """[V, D] uint8, the next 8 bits; None for fp32."""

    @classmethod
    def of(cls, kept: int, weight: Tensor) -> _Gradients:
        narrow = weight.dtype != torch.float32
        # The first chunk writes all of them.
        new = torch.empty if kept else torch.zeros
        at = weight.device
        return cls(
            torch.empty(kept, weight.shape[1], dtype=torch.float32, device=at),
            new(weight.shape, dtype=weight.dtype, device=at),
            new(weight.shape, dtype=torch.uint8, device=at) if narrow else None,
        )

    @property
    def weight_bits(self) -> Tensor:
        return self.weight if self.low is None else self.weight.view(torch.int16)


@dataclass(frozen=True)
class _Chunk:
    """Rows of one chunk, in whole blocks."""

    hidden: Tensor
    """[R, D]."""
    labels: Tensor
    """[R] int32, -1 in rows that only fill a block."""
    start: int
    kept: int

    @classmethod
    def of(cls, hidden: Tensor, labels: Tensor, kept: Tensor, start: int, call: _Call) -> _Chunk:
        index = kept[start : start + call.chunk_rows]
        count = index.shape[0]
        fill = -count % call.block_rows
        targets = labels[index].to(torch.int32)
        if fill:
            index = torch.cat([index, index[-1:].expand(fill)])
            targets = torch.cat([targets, targets.new_full((fill,), -1)])
        return cls(hidden[index], targets, start, count)

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]


def _chunk_loss(
    call: _Call, chunk: _Chunk, weight: Tensor, z_loss: float, gradients: _Gradients | None
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of a chunk, of it z-loss if there is one; its gradients are added to `gradients`.
    A function of its own, so that a chunk's scores are gone before the next one's are made."""
    rows, device = chunk.rows, weight.device
    tiles = call.tiles
    maxima, sums = (torch.empty(tiles, rows, dtype=torch.float32, device=device) for _ in range(2))
    loss = torch.empty(rows, dtype=torch.float32, device=device)
    # A label of no class leaves its row's, and the loss is NaN.
    chosen = torch.full((rows,), torch.nan, dtype=torch.float32, device=device)
    scores = gradient = None
    if gradients is not None:
        kind = torch.float32 if call.wide else torch.float16
        scores = torch.empty(rows, call.width, dtype=kind, device=device)
        gradient = scores if call.wide else scores.view(torch.bfloat16)
    config = call.config("loss_scores")
    launch(
        loss_scores, (rows // config.blocks["BM"] * tiles,), config,
        chunk.hidden, weight, chunk.labels, scores, maxima, sums, chosen,
        rows, call.vocab, call.width, tiles, GRAD=gradients is not None, **call.constants,
    )  # fmt: skip
    launch(
        loss_gradient, (rows,), call.config("loss_gradient"),
        scores, gradient, maxima, sums, chosen, chunk.labels, loss,
        rows, call.width, tiles, z_loss,
        GRAD=gradients is not None, TILES=1 << (tiles - 1).bit_length(), BN=call.tile,
    )  # fmt: skip
    if gradients is not None and gradient is not None:
        _add_grad_hidden(call, chunk, weight, gradient, gradients)
        _add_grad_weight(call, chunk, gradient, gradients)
    if not z_loss:
        return loss.sum(), None
    return loss.sum(), z_loss * _logarithms(maxima, sums)[: chunk.kept].square().sum()


def _logarithms(maxima: Tensor, sums: Tensor) -> Tensor:
    """[R] of the softmax sums, from what each block of classes has left, [tiles, R]: the kernel
    does not tell the z-loss apart, and this is small beside the scores."""
    return (maxima + sums.log()).logsumexp(dim=0)


def _add_grad_hidden(
    call: _Call, chunk: _Chunk, weight: Tensor, gradient: Tensor, gradients: _Gradients
) -> None:
    config = call.config("loss_grad_hidden")
    splits, each = call.splits(chunk.rows)
    partial = torch.empty(
        splits, chunk.rows, call.columns, dtype=torch.float32, device=weight.device
    )
    tiles = chunk.rows // config.blocks["BM"] * (call.columns // config.blocks["BN"])
    launch(
        loss_grad_hidden, (tiles * splits,), config, gradient, weight, partial,
        chunk.rows, call.vocab, call.width, splits, each, **call.constants,
    )  # fmt: skip
    own = gradients.rows[chunk.start : chunk.start + chunk.kept]
    torch.sum(partial[:, : chunk.kept], dim=0, out=own)


def _add_grad_weight(call: _Call, chunk: _Chunk, gradient: Tensor, gradients: _Gradients) -> None:
    config = call.config("loss_grad_weight")
    tiles = -(-call.vocab // config.blocks["BM"]) * (call.columns // config.blocks["BN"])
    launch(
        loss_grad_weight, (tiles,), config,
        gradient, chunk.hidden, gradients.weight_bits, gradients.low,
        chunk.rows, call.vocab, call.width,
        FIRST=chunk.start == 0, NARROW=gradients.low is not None, **call.constants,
    )  # fmt: skip


def _supervised(labels: Tensor, ignore: int) -> Tensor:
    """Indices of supervised tokens; of labels without values (`meta`) all."""
    if labels.device.type == "meta":
        return torch.arange(labels.shape[0], device="meta")
    return (labels != ignore).nonzero().squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, how: tuple[int, float, bool]
    ) -> tuple[Tensor, Tensor]:
        ignore, z_loss, recorded = how
        call = _Call.of(hidden, weight)
        kept = _supervised(labels, ignore)
        need_grad = recorded and any(ctx.needs_input_grad[:2])
        gradients = _Gradients.of(kept.shape[0], weight) if need_grad else None
        loss, z = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, kept.shape[0], call.chunk_rows):
            chunk = _Chunk.of(hidden, labels, kept, start, call)
            chunk_loss, chunk_z = _chunk_loss(call, chunk, weight, z_loss, gradients)
            loss += chunk_loss
            if chunk_z is not None:
                z += chunk_z
        ctx.gradients, ctx.like = gradients, (hidden.shape, hidden.dtype, call)
        if need_grad:
            ctx.save_for_backward(kept)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradients: _Gradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran twice; its gradients were used up"
            )
        ctx.gradients = None
        (kept,) = ctx.saved_tensors
        shape, dtype, call = ctx.like
        grad_weight = _finished(call, gradients, grad)
        grad_hidden = torch.zeros(shape, dtype=dtype, device=grad.device)
        grad_hidden.index_copy_(0, kept, gradients.rows.mul_(grad).to(dtype))
        return grad_hidden, grad_weight, None, None


def _finished(call: _Call, gradients: _Gradients, grad: Tensor) -> Tensor:
    """The weight's gradient times `grad`, in place."""
    weight, low = gradients.weight, gradients.low
    if low is None:
        return weight.mul_(grad)
    config = call.config("loss_finish")
    grid = (-(-weight.numel() // config.blocks["BLOCK"]),)
    launch(
        loss_finish, grid, config, gradients.weight_bits, low, weight, grad.float(), weight.numel()
    )
    return weight


def linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.linear_cross_entropy.op.linear_cross_entropy_and_z`."""
    require_triton("linear_cross_entropy", hidden, weight)
    require_one_type("linear_cross_entropy", hidden, weight)
    if weight.shape[1] % SMALLEST:
        raise ValueError(
            f"kernels.linear_cross_entropy: triton takes hidden sizes that are multiples of "
            f"{SMALLEST}, not {weight.shape[1]}"
        )
    # Within forward grad mode is always off and needs_input_grad ignores it, so it is asked here.
    how = (ignore, z_loss, torch.is_grad_enabled())
    loss, z = _LinearCrossEntropy.apply(hidden.contiguous(), weight.contiguous(), labels, how)
    return loss, z


def operations(tokens: int, vocab: int, columns: int, arch: str) -> tuple[int, int]:
    """Operations of the products for so many supervised tokens in bf16, two for each multiply-add,
    and those of the plain loss: logits and two gradients."""
    call = _Call(vocab, columns, False, arch)
    hidden, weight = (call.config(f"loss_grad_{name}").blocks for name in ("hidden", "weight"))
    rows = -(-tokens // call.block_rows) * call.block_rows
    classes = call.tiles * call.tile
    classes += -(-vocab // hidden["BK"]) * hidden["BK"] + -(-vocab // weight["BM"]) * weight["BM"]
    return 2 * rows * columns * classes, 6 * tokens * vocab * columns


def traffic(tokens: int, vocab: int, columns: int, arch: str) -> dict[str, int]:
    """Bytes that each kernel reads and writes for one chunk of so many supervised tokens in bf16,
    not the first, each byte once."""
    call = _Call(vocab, columns, False, arch)
    rows = -(-tokens // call.block_rows) * call.block_rows
    hidden, weight = (call.config(f"loss_grad_{name}").blocks for name in ("hidden", "weight"))
    splits, _ = call.splits(rows)
    parts = 2 * 4 * call.tiles * rows
    scores = 2 * rows * call.tiles * call.tile
    steps = -(-vocab // hidden["BK"]) * hidden["BK"]
    blocks = -(-vocab // weight["BM"]) * weight["BM"]
    per_row = 4 * rows + 4 * tokens
    return {
        "loss_scores": 2 * (rows + vocab) * columns + scores + parts + per_row,
        "loss_gradient": parts + 2 * scores + per_row + 4 * rows,
        "loss_grad_hidden": 2 * (rows * steps + vocab * columns) + 4 * splits * rows * columns,
        "loss_grad_weight": 2 * rows * (blocks + columns) + 2 * 3 * vocab * columns,
    }
