"""SwiGLU experts over rows sorted by expert in Triton: two kernels forward, four backward.

The products of all experts are one launch: `grouped_mlp_plan` cuts every expert's rows into tiles,
from their own start and on the device, so the host need not know how many rows an expert has; it
launches programs for the most tiles there can be, and those without one end at once. An expert
without rows has no tile, an over-full one more.

Fused: SwiGLU into the end of the first product, and its gradient into the end of the product
before it. Saved for backward: the rows and, unless `recompute`, the pre-activation, which the first
kernel then makes again. The activation is made again from it in either case. Gradients of weights
are summed in fp32 in one program per tile: no atomics, two runs agree bitwise.

Legend: R rows, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from zaya_kernels.grouped_mlp.triton_kernels import (
    grouped_mlp_down,
    grouped_mlp_grad_down,
    grouped_mlp_grad_gate_up,
    grouped_mlp_grad_hidden,
    grouped_mlp_grad_rows,
    grouped_mlp_plan,
    grouped_mlp_up,
    grouped_mlp_up_again,
)
from zaya_kernels.grouped_mlp.types import MainGradients
from zaya_kernels.launch import (
    CHIPLETS,
    Config,
    architecture,
    launch,
    require_one_type,
    require_triton,
)

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 4
"""Tiles of rows that share their columns' operand while it is in a cache."""


Table = dict[str, dict[str, Config]]


def _tile(m: int, n: int, k: int, warps: int, stages: int = 2, **options: int) -> Config:
    return Config({"BM": m, "BN": n, "BK": k}, num_warps=warps, num_stages=stages, **options)


def _by_arch(gfx942: Config, gfx950: Config, sm_90: Config) -> dict[str, Config]:
    return {"gfx942": gfx942, "gfx950": gfx950, "sm_90": sm_90}


def _in_parts(of_up: dict[str, Config], **parts: int) -> dict[str, Config]:
    """`parts` (1 or 2) of the columns go through SwiGLU in turn: up has two accumulators, and
    registers are short."""
    return {a: replace(c, blocks={**c.blocks, "PARTS": parts[a]}) for a, c in of_up.items()}


def _table(up: dict[str, Config], down: dict[str, Config], by_rows: dict[str, Config],
           weights: dict[str, Config]) -> Table:  # fmt: skip
    """BM of `up`, `down` and `by_rows`, the data gradients, is the plan's."""
    return {
        "grouped_mlp_up": up,
        "grouped_mlp_up_again": up,
        "grouped_mlp_down": down,
        "grouped_mlp_grad_hidden": by_rows,
        "grouped_mlp_grad_rows": by_rows,
        "grouped_mlp_grad_gate_up": weights,
        "grouped_mlp_grad_down": weights,
    }


MANY_ROWS = 512
"""Rows per expert, on average, from which on the large tiles are used."""

# gfx950 multiplies twice as fast: it takes longer steps, for which it has the LDS, and the larger
# instruction, whose operands take fewer registers.
_LARGE = {"matrix_instr_nonkdim": 32}
_WEIGHTS = _by_arch(
    _tile(256, 256, 32, 8), _tile(256, 256, 64, 8, **_LARGE), _tile(128, 128, 64, 8, 3)
)
_MANY = _by_arch(
    _tile(256, 256, 32, 8), _tile(256, 256, 64, 8, 3, **_LARGE), _tile(128, 128, 64, 8, 3)
)
_WIDE = _by_arch(_tile(64, 64, 32, 4), _tile(64, 64, 32, 4), _tile(64, 64, 32, 8, 1))

CONFIGS = {
    "many": _table(
        _in_parts(
            _by_arch(
                _tile(256, 128, 32, 8),
                _tile(256, 128, 64, 8, 3, **_LARGE),
                _tile(128, 64, 64, 8, 3),
            ),
            gfx942=2, gfx950=1, sm_90=2,
        ),
        _MANY,
        _MANY,
        _WEIGHTS,
    ),
    "few": _table(
        _in_parts(
            _by_arch(
                _tile(128, 128, 64, 8), _tile(128, 128, 128, 8, **_LARGE), _tile(64, 64, 64, 4, 3)
            ),
            gfx942=1, gfx950=1, sm_90=1,
        ),
        _by_arch(
            _tile(128, 256, 64, 8), _tile(128, 256, 128, 8, **_LARGE), _tile(64, 128, 64, 4, 3)
        ),
        # A tile of weights is turned on its way to LDS, for half the rows of `many`; 16 x 16: 68 %.
        _by_arch(
            _tile(128, 256, 64, 8, kpack=2, **_LARGE),
            _tile(128, 256, 128, 8, **_LARGE),
            _tile(64, 128, 64, 4, 3),
        ),
        _WEIGHTS,
    ),
    "fp32": _table(_in_parts(_WIDE, gfx942=1, gfx950=1, sm_90=1), _WIDE, _WIDE, _WIDE),
}  # fmt: skip
"""bf16 by rows per expert; fp32."""


@dataclass(frozen=True)
class _Call:
    """What every launch of one MLP shares."""

    experts: int
    hidden: int
    width: int
    arch: str
    table: str
    """Of CONFIGS."""

    @classmethod
    def of(cls, rows: Tensor, down: Tensor) -> _Call:
        experts, hidden, width = down.shape
        table = "many" if rows.shape[0] >= MANY_ROWS * experts else "few"
        if rows.dtype.itemsize == 4:
            table = "fp32"
        return cls(experts, hidden, width, architecture(rows.device), table)

    def config(self, kernel: str) -> Config:
        return CONFIGS[self.table][kernel][self.arch]

    @property
    def constants(self) -> dict[str, int]:
        return {"D": self.hidden, "F": self.width, "GROUP": GROUP, "XCDS": CHIPLETS[self.arch]}

    def plan(self, counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """offsets [E + 2] and tiles [most there can be, 3], int32, of counts [E]."""
        block = self.config("grouped_mlp_up").blocks["BM"]
        most = rows // block + self.experts
        offsets = torch.empty(self.experts + 2, dtype=torch.int32, device=counts.device)
        tiles = torch.empty(most, 3, dtype=torch.int32, device=counts.device)
        launch(
            grouped_mlp_plan, (self.experts + 1,), Config({"BM": block}, num_warps=1),
            counts, offsets, tiles, self.experts, most,
            EXPERTS=1 << (self.experts - 1).bit_length(),
        )  # fmt: skip
        return offsets, tiles

    def over_tiles(self, kernel: Any, columns: int, *arguments: Any, **constants: Any) -> None:
        """Launch for every tile of rows; the plan comes last among `arguments`."""
        config = self.config(kernel.__name__)
        grid = (arguments[-1].shape[0] * -(-columns // config.blocks["BN"]),)
        launch(kernel, grid, config, *arguments, self.experts, **self.constants, **constants)

    def over_weights(self, kernel: Any, sums: Tensor, *arguments: Any, add: bool) -> None:
        """Launch for every tile of a weight's gradient; the offsets come last."""
        config = self.config(kernel.__name__)
        m, n = config.blocks["BM"], config.blocks["BN"]
        grid = (self.experts * -(-sums.shape[1] // m) * -(-sums.shape[2] // n),)
        launch(kernel, grid, config, sums, *arguments, self.experts, ADD=add, **self.constants)


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor,
        recompute: bool, main: MainGradients | None,
    ) -> Tensor:  # fmt: skip
        call = _Call.of(rows, down)
        plan = call.plan(counts, rows.shape[0])
        hidden = None if recompute else rows.new_empty(rows.shape[0], 2 * call.width)
        activated = rows.new_empty(rows.shape[0], call.width)
        out = torch.empty_like(rows)
        call.over_tiles(
            grouped_mlp_up, call.width, rows, gate_up, hidden, activated, *plan,
            KEEP=not recompute,
        )  # fmt: skip
        call.over_tiles(grouped_mlp_down, call.hidden, activated, down, out, *plan)
        ctx.save_for_backward(rows, hidden, gate_up, down, *plan)
        ctx.call, ctx.main = call, main
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, gate_up, down, *plan = ctx.saved_tensors
        call: _Call = ctx.call
        main: MainGradients | None = ctx.main
        grad = grad.contiguous()
        if hidden is None:
            hidden = rows.new_empty(rows.shape[0], 2 * call.width)
            call.over_tiles(grouped_mlp_up_again, call.width, rows, gate_up, hidden, *plan)
        grad_hidden, grad_rows = torch.empty_like(hidden), None
        activated = rows.new_empty(rows.shape[0], call.width)
        call.over_tiles(
            grouped_mlp_grad_hidden, call.width, grad, down, hidden, grad_hidden, activated,
            call.width, *plan,
        )  # fmt: skip
        if ctx.needs_input_grad[0]:
            grad_rows = torch.empty_like(rows)
            call.over_tiles(
                grouped_mlp_grad_rows, call.hidden, grad_hidden, gate_up, grad_rows,
                call.hidden, *plan,
            )  # fmt: skip
        own = main or MainGradients(torch.empty_like(gate_up), torch.empty_like(down))
        add, offsets = main is not None, plan[0]
        call.over_weights(
            grouped_mlp_grad_gate_up, own.gate_up, grad_hidden, rows, offsets, add=add
        )
        call.over_weights(grouped_mlp_grad_down, own.down, grad, activated, offsets, add=add)
        grads = (None, None) if main else (own.gate_up, own.down)
        return grad_rows, None, *grads, None, None


def grouped_mlp_triton(
    rows: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    recompute: bool,
    main: MainGradients | None,
) -> Tensor:
    """See `zaya_kernels.grouped_mlp.op.grouped_mlp`."""
    require_triton("grouped_mlp", rows, gate_up, down)
    require_one_type("grouped_mlp", rows, gate_up, down)
    for sums in () if main is None else (main.gate_up, main.down):
        if sums.dtype != torch.float32 or not sums.is_contiguous():
            raise ValueError(
                f"kernels.grouped_mlp: main gradients are contiguous and fp32, not {sums.dtype}"
            )
    out: Tensor = _GroupedMLP.apply(
        rows.contiguous(), counts.to(rows.device, non_blocking=True),
        gate_up.contiguous(), down.contiguous(), recompute, main,
    )  # fmt: skip
    return out
