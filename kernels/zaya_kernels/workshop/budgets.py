"""What a compiled kernel may use. A kernel that breaks its budget is not shipped.

No kernel spills vector registers, uses scratch memory on AMD, or takes more LDS than a workgroup
has. What differs by kernel stands in the table, each allowance with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zaya_kernels.workshop.assembly import LDS_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_kernels.workshop.assembly import Resources

SHARED_BYTES = {**LDS_BYTES, "sm_90": 232448}


@dataclass(frozen=True)
class Budget:
    """Bounds on one kernel's resources on gfx942 and gfx950, and its stack on sm_90."""

    waves: int
    """At least so many per SIMD."""
    matrix: bool = False
    """Matrix instructions in the hot loop."""
    matrix_share: float = 0.0
    """At least such a part of the hot loop's static clocks with the matrix pipe busy."""
    narrow_loads: int = 0
    """Loads of fewer than 16 bytes a lane in the hot loop."""
    narrow_lds_reads: Mapping[str, int] = field(default_factory=dict)
    """LDS reads below 64 bits in the hot loop, by architecture; 0 where none is given."""
    scalar_spills: int = 0
    """Scalar registers kept in vector lanes; no memory is touched."""
    stack_bytes: int = 0
    """sm_90 only."""
    why: str = ""


def _both(number: int) -> dict[str, int]:
    """The same allowance on gfx942 and gfx950."""
    return dict.fromkeys(LDS_BYTES, number)


_PRODUCT = Budget(waves=2, matrix=True, matrix_share=0.70)
_WEIGHT_PRODUCT = Budget(waves=2, matrix=True, matrix_share=0.68)

BUDGETS = {
    "norm_residual_forward": Budget(
        waves=6, narrow_lds_reads=_both(2), why="LDS: the row's sum across waves"
    ),
    "norm_residual_backward": Budget(
        waves=3,
        narrow_loads=1,
        narrow_lds_reads=_both(2),
        why="waves: four column sums in registers; load: one number per row; LDS: the row's sum",
    ),
    "cca_forward": Budget(
        waves=2,
        matrix=True,
        narrow_lds_reads=_both(6),
        scalar_spills=80,
        stack_bytes=160,
        why="LDS: row norms and positions; scalars: buffer descriptors, only with halos; stack: "
        "sm_90 with halos has 255 registers a thread at most",
    ),
    "cca_backward": Budget(
        waves=1,
        matrix=True,
        scalar_spills=112,
        stack_bytes=1280,
        why="waves, stack: two matrices of sums stay in registers, half of what sm_90 has; "
        "scalars: buffer descriptors, most of them with halos",
    ),
    "attention_forward": Budget(
        waves=2, matrix=True, narrow_lds_reads=_both(1), why="LDS: the row sums, in fp32 only"
    ),
    "attention_backward_queries": Budget(
        waves=1,
        matrix=True,
        stack_bytes=256,
        why="waves, stack: fp32 only; bf16 has two waves and no stack",
    ),
    "attention_backward_keys": Budget(
        waves=1,
        matrix=True,
        scalar_spills=51,
        why="waves: two gradients and two operands stay in registers; scalars: buffer "
        "descriptors of both loops",
    ),
    "router_product": Budget(
        waves=2, matrix=True, narrow_loads=8, why="loads: the norm's weight, a number a column"
    ),
    "router_choice": Budget(waves=2, matrix=True),
    "router_grad_choice": Budget(
        waves=6, matrix=True, narrow_loads=12, why="loads: 17 probabilities a row"
    ),
    "router_grad_state": Budget(waves=2, matrix=True),
    "router_grad_weight": Budget(
        waves=2, matrix=True, narrow_loads=8, why="loads: the norm's factor, a number a row"
    ),
    "loss_scores": Budget(waves=2, matrix=True),
    "loss_gradient": Budget(
        waves=6, narrow_loads=2, why="loads: one maximum per block of 128 probabilities"
    ),
    "loss_grad_hidden": Budget(waves=2, matrix=True),
    "loss_grad_weight": Budget(waves=2, matrix=True),
    "loss_finish": Budget(waves=6),
    "permute_count": Budget(
        waves=8,
        narrow_loads=1,
        narrow_lds_reads=_both(2),
        why="loads: a token's choice; LDS: sums of classes across waves",
    ),
    "permute_sum": Budget(
        waves=8, narrow_lds_reads=_both(1), why="LDS: sums of classes across waves"
    ),
    "permute_place": Budget(
        waves=4,
        narrow_loads=2,
        narrow_lds_reads=_both(4),
        why="loads: a token's choice; LDS: its rank, one number a token",
    ),
    "permute_gather": Budget(waves=8),
    "permute_scatter": Budget(waves=8),
    "permute_scatter_backward": Budget(
        waves=8, narrow_lds_reads=_both(2), why="LDS: the probability's gradient across waves"
    ),
    "grouped_mlp_plan": Budget(waves=8),
    "grouped_mlp_up": _PRODUCT,
    "grouped_mlp_up_again": _PRODUCT,
    "grouped_mlp_down": _PRODUCT,
    "grouped_mlp_grad_hidden": _PRODUCT,
    "grouped_mlp_grad_rows": _PRODUCT,
    "grouped_mlp_grad_gate_up": _WEIGHT_PRODUCT,
    "grouped_mlp_grad_down": _WEIGHT_PRODUCT,
    "newton_schulz_symmetric": Budget(waves=2, matrix=True),
    "newton_schulz_apply": Budget(waves=2, matrix=True),
}


OF_CASES = {
    ("linear_cross_entropy/evaluation", "loss_gradient"): Budget(
        waves=6,
        narrow_loads=17,
        narrow_lds_reads=_both(4),
        why="it reads the maxima and sums of a row's blocks and nothing in bulk",
    )
}
"""Budgets of a kernel in one case of the registry, where it does something else."""


def share_lost(kernel: str, matrix_share: float) -> list[str]:
    """What is said of a hot loop whose matrix pipe is busy for less than its budget."""
    least = BUDGETS[kernel].matrix_share
    return [f"matrix share {matrix_share:.1%}, at least {least:.0%}"] * (matrix_share < least)


def broken(case: str, kernel: str, arch: str, found: Resources) -> list[str]:
    """What of its budget a kernel exceeds, one phrase each; KeyError for one without a budget."""
    budget = OF_CASES.get((case, kernel)) or BUDGETS[kernel]
    rules = [("LDS bytes", found.lds_bytes, SHARED_BYTES[arch])]
    if found.loop is None:
        rules.append(("stack bytes", found.scratch_bytes, budget.stack_bytes))
        return _over(rules)
    loop = found.loop
    rules += [
        ("vector spills", found.vector_spills, 0),
        ("scalar spills", found.scalar_spills, budget.scalar_spills),
        ("scratch bytes", found.scratch_bytes, 0),
        ("scratch accesses", loop.scratch, 0),
        ("narrow loads", loop.narrow_loads, budget.narrow_loads),
        ("narrow LDS reads", loop.narrow_lds_reads, budget.narrow_lds_reads.get(arch, 0)),
    ]
    problems = _over(rules)
    if found.waves < budget.waves:
        problems.append(f"{found.waves} waves per SIMD, at least {budget.waves}")
    if budget.matrix and not loop.matrix:
        problems.append("no matrix instruction in the hot loop")
    return problems


def _over(rules: list[tuple[str, int, int]]) -> list[str]:
    return [f"{value} {name}, at most {limit}" for name, value, limit in rules if value > limit]
