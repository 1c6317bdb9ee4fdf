"""Stable counting sort by expert, gather and weighted scatter in Triton, without a host wait.

The sort: every block of tokens counts its classes; one program sums the blocks up; every block then
puts its tokens behind those of earlier blocks. No atomics, so places do not depend on timing.

The moves: a program per place of the order, which brings one row from or to its token. Each row is
read once and written once.

Legend: T tokens, E experts, C = E + 1 classes, D columns, R rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.launch import (
    ARCHITECTURES,
    Config,
    architecture,
    launch,
    require_one_type,
    require_triton,
)
from zaya_kernels.moe_permute import moves
from zaya_kernels.moe_permute.triton_kernels import (
    permute_count,
    permute_gather,
    permute_place,
    permute_scatter,
    permute_scatter_backward,
    permute_sum,
)
from zaya_kernels.moe_permute.types import Load

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.moe_permute.moves import Scattered
    from zaya_kernels.moe_permute.types import Order

MOST_EXPERTS = 511
"""More would need smaller blocks than a program has lanes for."""
_BLOCK_NUMBERS = 8192
"""Tokens times padded classes of a block of the sort; 32 registers a lane."""

_MOVE = Config({}, num_warps=4, num_stages=1)
CONFIGS = {
    "permute_count": dict.fromkeys(ARCHITECTURES, Config({"BT": 256}, num_stages=1)),
    "permute_sum": dict.fromkeys(ARCHITECTURES, Config({"BB": 64}, num_stages=1)),
    "permute_place": dict.fromkeys(ARCHITECTURES, Config({"BT": 256}, num_stages=1)),
    "permute_gather": dict.fromkeys(ARCHITECTURES, _MOVE),
    "permute_scatter": dict.fromkeys(ARCHITECTURES, _MOVE),
    "permute_scatter_backward": dict.fromkeys(ARCHITECTURES, _MOVE),
}
"""BT and BB are of few classes, see `_sort_config`."""


def _sort_config(kernel: str, classes: int, device: torch.device) -> Config:
    """Fewer tokens a block, or blocks a step, where there are many classes."""
    config = CONFIGS[kernel][architecture(device)]
    ((name, most),) = config.blocks.items()
    blocks = {name: min(most, _BLOCK_NUMBERS // classes)}
    return Config(blocks, num_warps=config.num_warps, num_stages=config.num_stages)


def count(choice: Tensor, num_experts: int) -> Load:
    """See `zaya_kernels.moe_permute.op.count_by_expert`."""
    if num_experts > MOST_EXPERTS:
        raise ValueError(
            f"kernels.moe_permute: triton sorts by {MOST_EXPERTS} experts at most, "
            f"not {num_experts}"
        )
    # The choice has a type of its own; where it is must be asked all the same.
    require_triton("moe_permute", choice.new_empty(0, dtype=torch.float32))
    choice, tokens = choice.contiguous(), choice.numel()
    classes = 1 << num_experts.bit_length()
    config = _sort_config("permute_count", classes, choice.device)
    blocks = max(1, -(-tokens // config.blocks["BT"]))
    found, starts = (
        torch.empty(blocks, classes, dtype=torch.int32, device=choice.device) for _ in range(2)
    )
    counts = torch.empty(num_experts + 1, dtype=torch.int64, device=choice.device)
    launch(permute_count, (blocks,), config, choice, found, tokens, CLASSES=classes)
    launch(
        permute_sum, (1,), _sort_config("permute_sum", classes, choice.device),
        found, starts, counts, blocks, num_experts, CLASSES=classes,
    )  # fmt: skip
    return Load(choice, counts, "triton", starts)


def sort(load: Load) -> Tensor:
    """See `zaya_kernels.moe_permute.op.sort_by_expert`."""
    assert load.starts is not None
    blocks, classes = load.starts.shape
    config = _sort_config("permute_place", classes, load.choice.device)
    order = torch.empty_like(load.choice)
    launch(
        permute_place, (blocks,), config,
        load.choice, load.starts, order, load.choice.numel(), CLASSES=classes,
    )  # fmt: skip
    return order


def _move(kernel: Any, programs: int, order: Order, columns: int, *arguments: Any) -> None:
    """Launch for so many places; there may be none."""
    if programs:
        tokens, skipped = order.order.numel(), order.counts[-1:]
        config = CONFIGS[kernel.__name__][architecture(order.order.device)]
        width = 1 << (columns - 1).bit_length()
        launch(
            kernel, (programs,), config, *arguments, order.order, skipped, tokens,
            D=columns, COLUMNS=width,
        )  # fmt: skip


def _to_rows(tokens: Tensor, order: Order) -> Tensor:
    rows = tokens.new_empty(order.num_rows, tokens.shape[1])
    _move(permute_gather, order.num_rows, order, tokens.shape[1], tokens, rows)
    return rows


def _to_tokens(
    rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None
) -> Tensor:
    tokens = order.order.numel()
    out = rows.new_empty(tokens, rows.shape[1])
    _move(permute_scatter, tokens, order, rows.shape[1], rows, rest, probability, out)
    return out


def _scatter_backward(grad: Tensor, order: Order, of: Scattered, made: Scattered) -> None:
    columns = grad.shape[1]
    _move(permute_scatter_backward, order.order.numel(), order, columns, grad, *of, *made)


_MOVES = moves.Moves(_to_rows, _to_tokens, _scatter_backward)


def gather(tokens: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """See `zaya_kernels.moe_permute.op.gather`."""
    require_triton("moe_permute", tokens)
    return moves.gather(tokens, order, _MOVES)


def rest(base: Tensor, order: Order) -> Tensor:
    """See `zaya_kernels.moe_permute.op.rest_of`."""
    return base


def scatter(rows: Tensor, order: Order, rest: Tensor | None, probability: Tensor | None) -> Tensor:
    """See `zaya_kernels.moe_permute.op.scatter`."""
    require_triton("moe_permute", rows, rest, probability)
    require_one_type("moe_permute", rows, rest)
    return moves.scatter(rows, order, rest, probability, _MOVES)


def traffic(
    tokens: int, kept: int, columns: int, experts: int, itemsize: int = 2
) -> tuple[int, int]:
    """Bytes that sorting, gather, scatter and their backward passes move, each once per launch,
    and the fewest for two moves each way: rows, the choice, the probability in fp32 and its
    gradient. Tokens without an expert put out what they are."""
    row, classes = columns * itemsize, 1 << experts.bit_length()
    blocks = max(1, -(-tokens // min(256, _BLOCK_NUMBERS // classes)))
    # There; back; back's gradient, which reads both its factors; there's.
    rows = row * (2 * kept + 2 * tokens + 3 * tokens + 2 * tokens)
    fewest = rows + 8 * tokens + 3 * 4 * tokens
    sort = 2 * 8 * tokens + 4 * 4 * blocks * classes + 8 * (experts + 1) + 8 * tokens
    places = 8 * (kept + 3 * tokens) + 4 * 8
    return rows + sort + places + 3 * 4 * tokens, fewest
