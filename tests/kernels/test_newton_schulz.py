from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.newton_schulz import eager, gram
from zaya_kernels.newton_schulz.op import FIVE_QUINTICS, QUINTIC, newton_schulz

from zaya_train.config.newton_schulz import polynomials
from zaya_train.config.schema import MuonConfig

from ..helpers.kernels import error, random

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("eager", "gram", "reference")


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
    result = newton_schulz(matrices.float(), FIVE_QUINTICS, dtype, backend)
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
    assert (
        error(newton_schulz(matrices, (QUINTIC,) * steps, torch.float64, backend), expected)
        <= 1e-10
    )


POLAR_EXPRESS = polynomials(
    MuonConfig(learning_rate=1.0, newton_schulz_coefficients="polar_express")
)
UNLIKE = ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5), (1.5, -0.5, 0.1), (1.2, -0.3, 0.05))


@pytest.mark.parametrize("rows", [9, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_step_has_its_own_polynomial(backend: str, rows: int) -> None:
    """256 rows are enough for the Gram form."""
    matrices = random(1, rows, rows + 3, seed=1)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for a, b, c in UNLIKE:
        s = a * s + b * s**3 + c * s**5
    expected = (u * s[:, None]) @ vh
    assert error(newton_schulz(matrices, UNLIKE, torch.float64, backend), expected) <= 1e-10


def test_a_gram_matrix_is_left_before_its_rounding_has_grown() -> None:
    quintics = [len(run) for run in gram.runs((QUINTIC,) * 7)]
    assert quintics == [3, 2, 2]
    assert [len(run) for run in gram.runs(POLAR_EXPRESS)] == [2, 2, 1]
    assert [step for run in gram.runs(POLAR_EXPRESS) for step in run] == list(POLAR_EXPRESS)
    assert list(gram.runs(())) == []


def decaying(n: int, m: int, decades: float) -> Tensor:
    """[1, n, m] with singular values from 1 down to 10^-decades."""
    u = torch.linalg.qr(random(n, n, seed=1))[0]
    v = torch.linalg.qr(random(m, m, seed=2))[0]
    product: Tensor = (u * torch.logspace(-decades, 0, n, dtype=torch.float64)) @ v[:n]
    return product.unsqueeze(0)


def of_rank(rank: int) -> Tensor:
    return random(1, 270, rank, seed=1) @ random(1, rank, 300, seed=2)


@pytest.mark.parametrize(
    "matrices", [decaying(270, 300, 2.0), decaying(270, 300, 4.0), of_rank(2)],
    ids=["2 decades", "4 decades", "rank 2"],
)  # fmt: skip
def test_the_gram_form_errs_like_the_plain_one_by_polar_express(matrices: Tensor) -> None:
    """Twice as much where every value has converged: rounding alone is left."""
    exact = newton_schulz(matrices, POLAR_EXPRESS, torch.float64, "reference")
    errors = {
        name: error(newton_schulz(matrices.float(), POLAR_EXPRESS, torch.bfloat16, name), exact)
        for name in ("reference", "gram")
    }
    assert errors["gram"] <= 2.2 * errors["reference"]


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (13, 5), (5, 13)], ids=str)
def test_eager_equals_reference(shape: tuple[int, int]) -> None:
    matrices = random(3, *shape, seed=1)
    found = newton_schulz(matrices, FIVE_QUINTICS, torch.float64, "eager")
    assert error(found, newton_schulz(matrices, FIVE_QUINTICS, torch.float64, "reference")) <= 1e-10


@pytest.mark.parametrize("size", [(160, 130), (130, 160), (150, 150)], ids=str)
def test_large_fp32_matrices(size: tuple[int, int]) -> None:
    """Large enough for oneDNN."""
    matrices = with_singular_values(*size, low=0.1, seed=1)
    exact = newton_schulz(matrices, FIVE_QUINTICS, torch.float64, "reference")
    assert (
        error(newton_schulz(matrices.float(), FIVE_QUINTICS, torch.float32, "eager"), exact) <= 1e-4
    )


@pytest.mark.parametrize("decades", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gram_form_errs_like_the_plain_one(dtype: torch.dtype, decades: float) -> None:
    """The plain form is the reference in `dtype`; rounding differs, so there is some slack."""
    matrices = decaying(270, 300, decades)
    exact = newton_schulz(matrices, FIVE_QUINTICS, torch.float64, "reference")
    plain = error(newton_schulz(matrices.float(), FIVE_QUINTICS, dtype, "reference"), exact)
    found = newton_schulz(matrices.float(), FIVE_QUINTICS, dtype, "gram")
    assert error(found, exact) <= (2 * plain + 1e-5 if dtype == torch.float32 else 1.5 * plain)
    assert float(torch.linalg.svdvals(found.double()).max()) <= 1.25


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7])
def test_the_gram_form_takes_every_step(steps: int) -> None:
    x = random(1, 256, 260, seed=3)
    x /= x.norm()
    exact = newton_schulz(x, (QUINTIC,) * steps, torch.float64, "reference")
    found = gram.gram_form(x[0], (QUINTIC,) * steps)
    assert error(found, exact[0]) <= 1e-9


@pytest.mark.parametrize("n", [256, 300, 600])
def test_symmetric_products_compute_half(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And `operations` counts what `product` is asked for."""
    counted = []

    def counting(a: Tensor, b: Tensor) -> Tensor:
        counted.append(a.shape[0] * a.shape[1] * b.shape[1])
        return a @ b

    monkeypatch.setattr(gram, "product", counting)
    x = random(n, 2 * n, seed=1).float()
    gram.gram_form(x / x.norm(), FIVE_QUINTICS)
    mine, _ = gram.operations(n, 2 * n, FIVE_QUINTICS)
    assert sum(counted) == mine
    counted.clear()
    found = gram.symmetric(x, x.t())
    assert torch.equal(found, found.t()) and sum(counted) <= 0.78 * n * n * 2 * n
    assert error(found, x.double() @ x.double().t()) <= 1e-6
    assert (
        gram.operations(2048, 4096, FIVE_QUINTICS)[0]
        <= 0.6 * gram.operations(2048, 4096, FIVE_QUINTICS)[1]
    )


def test_small_matrices_take_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def noted(x: Tensor, *_: object) -> Tensor:
        taken.append(tuple(x.shape))
        return x

    monkeypatch.setattr(eager, "gram_form", noted)
    for backend in ("gram", "eager"):
        for n, m in ((255, 300), (256, 300), (300, 256)):
            newton_schulz(random(1, n, m, seed=1).float(), (QUINTIC,), torch.float32, backend)
    assert taken == [(256, 300), (256, 300)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_of_zeros_stays_zero(backend: str, dtype: torch.dtype) -> None:
    matrices = torch.stack([torch.zeros(4, 6), torch.randn(4, 6)])
    result = newton_schulz(matrices, FIVE_QUINTICS, dtype, backend)
    assert not result[0].any() and result[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(12, 12), (20, 6), (6, 20)], ids=str)
def test_commutes_with_transposition_and_scale(shape: tuple[int, int], backend: str) -> None:
    matrices = random(2, *shape, seed=1)
    result = newton_schulz(matrices, FIVE_QUINTICS, torch.float64, backend)
    turned = newton_schulz(matrices.mT.contiguous(), FIVE_QUINTICS, torch.float64, backend).mT
    assert error(turned, result) <= 1e-10
    assert (
        error(newton_schulz(matrices * 1e4, FIVE_QUINTICS, torch.float64, backend), result) <= 1e-10
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_is_fp32_and_the_input_is_left_alone(backend: str) -> None:
    matrices = random(2, 5, 8, seed=1).float()
    before = matrices.clone()
    assert newton_schulz(matrices, FIVE_QUINTICS, torch.bfloat16, backend).dtype == torch.float32
    assert torch.equal(matrices, before)
