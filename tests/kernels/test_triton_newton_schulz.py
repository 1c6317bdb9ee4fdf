"""Triton Newton-Schulz, interpreted, against float64 and against eager torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels import triton_kernels as programs
from zaya_kernels.launch import ARCHITECTURES, INTERPRETED, recording
from zaya_kernels.newton_schulz.op import FIVE_QUINTICS, QUINTIC, newton_schulz

from tests.dist.harness import relative
from tests.dist.muon_ranks import Grid, some_steps

from ..helpers.distributed import run_ranks
from ..helpers.kernels import error, random

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

pytest.importorskip("triton", reason="the extra `triton` is not installed")

import triton as triton_itself
import triton.language as tl
from zaya_kernels.newton_schulz import triton, triton_kernels
from zaya_kernels.workshop.interpreter import counting, install

from ..helpers.mutation import assert_caught, of_kernels, plant

pytestmark = pytest.mark.usefixtures("interpreter", "small_tiles")

TILE = 16


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, groups and chiplets in small matrices."""
    blocks = {
        "newton_schulz_symmetric": {"T": TILE, "BK": 32, "XCDS": 8},
        "newton_schulz_apply": {"BM": TILE, "BN": 32, "BK": 32, "GROUP": 3, "XCDS": 8},
    }
    for kernel, sizes in blocks.items():
        table = triton.CONFIGS[kernel]
        monkeypatch.setitem(table, INTERPRETED, replace(table[INTERPRETED], blocks=sizes))
        small = replace(triton.CONFIGS_FP32[kernel], blocks=sizes)
        monkeypatch.setitem(triton.CONFIGS_FP32, kernel, small)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the forms taken."""
    taken: list[str] = []

    def noting(name: str) -> Callable[..., Tensor]:
        form: Callable[..., Tensor] = getattr(triton, name)

        def noted(*arguments: object) -> Tensor:
            taken.append(name)
            return form(*arguments)

        return noted

    for name in ("_by_steps", "_by_gram"):
        monkeypatch.setattr(triton, name, noting(name))
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "form"),
    [((20, 20), "_by_steps"), ((20, 65), "_by_gram"), ((50, 20), "_by_gram"),
     ((1, 9), "_by_gram")],
)  # fmt: skip
def test_as_exact_as_eager(
    shape: tuple[int, int], form: str, dtype: torch.dtype, forms: list[str]
) -> None:
    """On fewer columns the Gram form rounds differently, hence the slack beside the plain form."""
    matrices = random(2, *shape, seed=1).float()
    exact = newton_schulz(matrices.double(), FIVE_QUINTICS, torch.float64, "reference")
    usual = error(newton_schulz(matrices, FIVE_QUINTICS, dtype, "eager"), exact)
    found = newton_schulz(matrices, FIVE_QUINTICS, dtype, "triton")
    assert forms == [form]
    assert found.dtype == torch.float32
    assert error(found, exact) <= 1.25 * usual + torch.finfo(dtype).eps / 8


UNLIKE = ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5), (1.5, -0.5, 0.1), (1.2, -0.3, 0.05))


@pytest.mark.parametrize(
    ("shape", "form"), [((20, 20), "_by_steps"), ((20, 65), "_by_gram")], ids=str
)
def test_every_step_has_its_own_polynomial(
    shape: tuple[int, int], form: str, forms: list[str]
) -> None:
    matrices = random(2, *shape, seed=1)
    exact = newton_schulz(matrices, UNLIKE, torch.float64, "reference")
    assert error(newton_schulz(matrices.float(), UNLIKE, torch.float32, "triton"), exact) <= 4e-6
    assert forms == [form]


def test_low_rank_stays_bounded() -> None:
    matrices = random(1, 32, 4, seed=1) @ random(1, 4, 80, seed=2)
    found = newton_schulz(matrices.float(), FIVE_QUINTICS, torch.bfloat16, "triton")
    exact = newton_schulz(matrices, FIVE_QUINTICS, torch.float64, "reference")
    usual = error(newton_schulz(matrices.float(), FIVE_QUINTICS, torch.bfloat16, "eager"), exact)
    assert error(found, exact) <= 1.25 * usual


@pytest.mark.parametrize("shape", [(32, 64), (32, 32)], ids=str)
def test_operations_are_what_the_kernels_multiply(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"newton_schulz_symmetric": {"T": 16, "BK": 16, "XCDS": 8}}
    sizes["newton_schulz_apply"] = {"BM": 16, "BN": 16, "BK": 16, "GROUP": 2, "XCDS": 8}
    for kernel, blocks in sizes.items():
        table = triton.CONFIGS[kernel]
        monkeypatch.setitem(table, INTERPRETED, replace(table[INTERPRETED], blocks=blocks))
    with counting() as counts:
        newton_schulz(random(1, *shape, seed=1).float(), (QUINTIC,) * 2, torch.bfloat16, "triton")
    mine, plain = triton.operations(*shape, (QUINTIC,) * 2, INTERPRETED)
    assert sum(count.dot_operations for count in counts) == 2 * mine
    n, m = shape
    assert plain == 2 * (n * n * m + n * n * n + n * n * m)


def test_operations_edges_are_not_padded() -> None:
    """One tile is a whole square; the last of two rows of tiles is as high as it is."""
    assert triton.operations(9, 9, (QUINTIC,), INTERPRETED) == (3 * 9**3, 3 * 9**3)
    lower = 16 * 16 + 4 * 20
    assert triton.operations(20, 20, (QUINTIC,), INTERPRETED)[0] == lower * 40 + 20**3


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != INTERPRETED])
def test_operations_of_the_models_matrices(arch: str) -> None:
    """ZAYA1-8B's experts: [4096, 2048] and [2048, 2048], one of each."""
    wide, plain_wide = triton.operations(2048, 4096, FIVE_QUINTICS, arch)
    square, plain_square = triton.operations(2048, 2048, FIVE_QUINTICS, arch)
    assert wide <= 0.55 * plain_wide
    assert square <= 0.69 * plain_square
    assert wide + square <= 0.6 * (plain_wide + plain_square)


def test_products_are_bitwise_symmetric_and_written_whole() -> None:
    x = random(2, 35, 40, seed=1).to(torch.bfloat16)
    gram = triton.gram_of(x)
    polynomial = triton.polynomial_of(gram, QUINTIC)
    for found in (gram, polynomial.rest, triton.product(polynomial, polynomial).rest):
        assert torch.equal(found, found.mT) and found.isfinite().all()
    assert not polynomial.rest.diagonal(dim1=1, dim2=2).any()
    exact = x.double() @ x.double().mT
    assert error(gram, exact) <= torch.finfo(torch.bfloat16).eps


def test_tiles_of_the_triangle_are_numbered_along_its_rows() -> None:
    """As many as a matrix of 65,536 rows has in tiles of 128."""

    @triton_itself.jit
    def number(rows, columns, N: tl.constexpr):
        o = tl.arange(0, N)
        row, column = triton_kernels._lower(o)
        tl.store(rows + o, row)
        tl.store(columns + o, column)

    side = 512
    count = side * (side + 1) // 2
    size = 1 << (count - 1).bit_length()
    rows, columns = (torch.empty(size, dtype=torch.int32) for _ in range(2))
    number[(1,)](rows, columns, N=size)
    expected = torch.tril_indices(side, side)
    assert torch.equal(rows[:count].long(), expected[0])
    assert torch.equal(columns[:count].long(), expected[1])


def test_two_runs_agree_bitwise_and_leave_the_input_alone() -> None:
    matrices = random(2, 20, 34, seed=1).float()
    before = matrices.clone()
    first, second = (
        newton_schulz(matrices, (QUINTIC,) * 4, torch.bfloat16, "triton") for _ in range(2)
    )
    assert torch.equal(first, second) and torch.equal(matrices, before)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 8, 5)], ids=str)
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    """No matrix, or no step."""
    matrices = random(*shape, seed=1).float()
    expected = newton_schulz(matrices, (), torch.float32, "eager")
    torch.testing.assert_close(newton_schulz(matrices, (), torch.float32, "triton"), expected)
    assert newton_schulz(matrices[:0], FIVE_QUINTICS, torch.float32, "triton").shape == (
        0,
        *shape[1:],
    )


def test_a_matrix_of_zeros_stays_zero() -> None:
    matrices = torch.stack([torch.zeros(4, 6), torch.ones(4, 6)])
    found = newton_schulz(matrices, (QUINTIC,) * 2, torch.bfloat16, "triton")
    assert not found[0].any() and found[1].any()


def test_what_it_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = random(1, 4, 4, seed=1)
    with pytest.raises(ValueError, match=r"kernels\.newton_schulz: triton takes fp32 and bf16"):
        newton_schulz(matrices, (QUINTIC,), torch.bfloat16, "triton")
    with pytest.raises(ValueError, match=r"triton computes in fp32 and bf16, not torch\.float64"):
        newton_schulz(matrices.float(), (QUINTIC,), torch.float64, "triton")
    huge = torch.empty(1, 2**15, 2**16, device="meta")
    with (
        recording(INTERPRETED),
        pytest.raises(ValueError, match=r"less than 2,147,483,648 elements, not \[32768, 65536\]"),
    ):
        newton_schulz(huge, (QUINTIC,), torch.bfloat16, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"kernels\.newton_schulz: triton needs a GPU"):
        newton_schulz(matrices.float(), (QUINTIC,), torch.bfloat16, "triton")


def both_backends() -> float:
    """Largest relative distance between weights after Muon's steps, Triton against eager."""
    install()
    grid = Grid(shard=2, shapes=((6, 10), (3, 4, 9)))
    ours, usual = some_steps(grid, "triton"), some_steps(grid)
    pairs = zip(ours.weights, usual.weights, strict=True)
    return max(relative(mine, theirs) for mine, theirs in pairs)


def test_distributed_muon_by_triton_equals_eager() -> None:
    """Two ranks: a matrix sharded by rows, and a stack sharded between matrices."""
    assert max(run_ranks(both_backends, 2)) <= 1e-5


BUGS = {
    "newton_schulz_symmetric": {
        "upper tiles left out": ("if row > column:", "if row > column + 1:"),
        "mirrored without turning": ("o_turned, tl.trans(b_out)", "o_turned, b_out"),
        "row stride of another tensor": (
            "o_turned = o_j[:, None] * n", "o_turned = o_j[:, None] * k",
        ),
        "linear term left out": ("+ right_scale * b_right", "+ 0.0 * b_right"),
        "constant term left out": ("tl.where(diagonal, identity, 0.0)", "0.0"),
        "diagonal of the left one by columns": (
            "left_diagonal + i_n * n + o_i, mask=o_i", "left_diagonal + i_n * n + o_j, mask=o_j",
        ),
        "diagonal of the right one left out": ("b_e * tl.load(left", "0 * tl.load(left"),
        "product of the diagonals left out": ("tl.where(diagonal, b_d * b_e, 0.0)", "0.0"),
        "diagonal counted twice": ("total = tl.where(diagonal, 0.0, total)", "total = total"),
        "sum runs on into the next row": ("m_k = (o_k < k - start)", "m_k = (o_k < k)"),
        "triangle numbered wrongly": (
            "number - row * (row + 1) // 2", "number - row * (row - 1) // 2",
        ),
        "matrices of the batch overlap": ("base = i_n * n * n", "base = i_n * n"),
    },
    "newton_schulz_apply": {
        "last group as high as the others": ("tl.minimum(tiles_n - above, GROUP)", "GROUP"),
        "diagonal not applied": ("b_d * tl.load(x + base", "0 * tl.load(x + base"),
        "last column lost": ("m_j = (o_j < m)", "m_j = (o_j < m - 1)"),
    },
}  # fmt: skip


def check() -> None:
    """Every kernel in every form, tiles cut short, more matrices than one."""
    x = random(2, 20, 40, seed=1)
    x /= torch.linalg.matrix_norm(x, keepdim=True)
    exact = newton_schulz(x, (QUINTIC,) * 2, torch.float64, "reference")
    assert error(triton._by_gram(x.float(), (QUINTIC,) * 2), exact) <= 4e-6


def test_without_a_bug_nothing_is_caught() -> None:
    check()


@of_kernels(BUGS)
def test_a_bug_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(BUGS[kernel][bug], triton_kernels, (triton, [kernel]), tmp_path, monkeypatch)
    assert_caught(check)


def test_work_dealt_twice_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = ("tl.minimum(chiplet, programs % XCDS)", "0")
    plant(change, programs, (triton_kernels, ["on_chiplets"]), tmp_path, monkeypatch)
    assert_caught(check)
