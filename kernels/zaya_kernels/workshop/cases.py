"""An operation on given inputs, its outputs and gradients, and how far they are from others.

Nothing here imports Triton: `numerics` compares Triton's kernels by it, and whoever else compares
back ends where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zaya_kernels.attention.op import attention
from zaya_kernels.cca.op import CCAContext, CCAWeights, Projections, cca
from zaya_kernels.moe_permute.op import count_by_expert, gather, rest_of, scatter, sort_by_expert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from zaya_kernels.attention.segments import AttentionPlan

    Run = Callable[[str, Mapping[str, Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One operation on named inputs; all of them get gradients."""

    name: str
    run: Run
    """Back end and inputs -> outputs."""
    inputs: Mapping[str, Tensor]
    differentiable: bool = True


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def passed(case: Case, backend: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed random projection of them, by name."""
    leaves = {n: x.detach().clone().requires_grad_(case.differentiable) for n, x in inputs.items()}
    outputs = list(case.run(backend, leaves))
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if not case.differentiable:
        return named
    weights = [random(*out.shape, seed=100 + i).to(out) for i, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return named | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-3))


def cca_run(context: CCAContext) -> Run:
    """CCA of inputs named as its arguments are."""

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        weights = CCAWeights(*(x[name] for name in CCAWeights.__dataclass_fields__))
        return cca(Projections(x["qk"], x["v_now"], x["v_delayed"]), weights, context, backend)

    return run


def attention_run(plan: AttentionPlan) -> Run:
    """Attention of q, k and v."""

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [attention(x["q"], x["k"], x["v"], plan, backend)]

    return run


def permute_run(choice: Tensor, num_experts: int) -> Run:
    """Tokens to their experts, doubled, and back with their probability."""

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        load = count_by_expert(choice, num_experts, backend)
        order = sort_by_expert(load, int(load.counts[:-1].sum()))
        rows, left = gather(x["tokens"], order)
        return [rows, scatter(2 * rows, order, rest_of(left, order), x["probability"])]

    return run
