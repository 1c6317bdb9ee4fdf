from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.newton_schulz.op import newton_schulz

from ..helpers.kernels import error, random

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("eager", "reference")


def with_singular_values(n: int, m: int, low: float, seed: int) -> Tensor:
    """[2, n, m] matrices whose singular values run from `low` to 1."""
    u = torch.linalg.qr(random(2, n, n, seed=seed))[0]
    v = torch.linalg.qr(random(2, m, m, seed=seed + 1))[0]
    rank = min(n, m)
    values = torch.linspace(low, 1.0, rank, dtype=torch.float64)
    product: Tensor = (u[:, :, :rank] * values) @ v[:, :rank]
    return product


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48), (1, 9), (9, 1)], ids=str)
def test_singular_values_end_near_one(
    shape: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    matrices = with_singular_values(*shape, low=0.1, seed=1) * 37.0
    result = newton_schulz(matrices.float(), 5, dtype, backend)
    values = torch.linalg.svdvals(result.double())
    slack = 0.02 if dtype == torch.bfloat16 else 0.0
    assert 0.68 - slack <= float(values.min()) and float(values.max()) <= 1.135 + slack


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)], ids=str)
def test_singular_values_follow_the_quintic(
    shape: tuple[int, int], steps: int, backend: str
) -> None:
    """Each singular value s becomes a s + b s^3 + c s^5 per step; the singular vectors stay."""
    matrices = random(2, *shape, seed=1)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = 3.4445, -4.7750, 2.0315  # kellerjordan.github.io/posts/muon
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    expected = (u * s[:, None]) @ vh
    assert error(newton_schulz(matrices, steps, torch.float64, backend), expected) <= 1e-10


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (13, 5), (5, 13)], ids=str)
def test_eager_equals_reference(shape: tuple[int, int]) -> None:
    matrices = random(3, *shape, seed=1)
    found = newton_schulz(matrices, 5, torch.float64, "eager")
    assert error(found, newton_schulz(matrices, 5, torch.float64, "reference")) <= 1e-10


@pytest.mark.parametrize("size", [(160, 130), (130, 160), (150, 150)], ids=str)
def test_large_fp32_matrices(size: tuple[int, int]) -> None:
    """Large enough for oneDNN."""
    matrices = with_singular_values(*size, low=0.1, seed=1)
    exact = newton_schulz(matrices, 5, torch.float64, "reference")
    assert error(newton_schulz(matrices.float(), 5, torch.float32, "eager"), exact) <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_of_zeros_stays_zero(backend: str, dtype: torch.dtype) -> None:
    matrices = torch.stack([torch.zeros(4, 6), torch.randn(4, 6)])
    result = newton_schulz(matrices, 5, dtype, backend)
    assert not result[0].any() and result[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(12, 12), (20, 6), (6, 20)], ids=str)
def test_commutes_with_transposition_and_scale(shape: tuple[int, int], backend: str) -> None:
    matrices = random(2, *shape, seed=1)
    result = newton_schulz(matrices, 5, torch.float64, backend)
    turned = newton_schulz(matrices.mT.contiguous(), 5, torch.float64, backend).mT
    assert error(turned, result) <= 1e-10
    assert error(newton_schulz(matrices * 1e4, 5, torch.float64, backend), result) <= 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_is_fp32_and_the_input_is_left_alone(backend: str) -> None:
    matrices = random(2, 5, 8, seed=1).float()
    before = matrices.clone()
    assert newton_schulz(matrices, 5, torch.bfloat16, backend).dtype == torch.float32
    assert torch.equal(matrices, before)
