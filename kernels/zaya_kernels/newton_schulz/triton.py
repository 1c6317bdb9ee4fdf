"""Newton-Schulz in Triton: a batch of equal shapes per launch, symmetric products computed once.

Two forms of the same iteration, chosen by shape as whichever multiplies less:

* by steps, as written: G = X X^T, P = b G + c G^2, X <- a X + P X, where G and P are symmetric: of
  their tiles the lower triangle is computed and each written twice. Of [n, n] 2/3 of the plain
  form's products and the tiles on the diagonal.
* on the Gram matrix (`gram` says why and how often it is taken anew): everything but the last
  product of a few steps is small and symmetric. For [n, 2n] 0.52 and the diagonal. Of square
  matrices it saves nothing more: there a step costs 2 n^3 in either.

What follows a product (the polynomial's other terms) is added before its one rounding, and the
last product is written in fp32 at once.

Legend: N matrices, n rows, m columns, n <= m, T rows and columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zaya_kernels.launch import Config, architecture, launch, require_triton
from zaya_kernels.newton_schulz.gram import runs
from zaya_kernels.newton_schulz.triton_kernels import newton_schulz_apply, newton_schulz_symmetric

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_kernels.newton_schulz import types

LARGEST = 2**31
"""Elements of one matrix are addressed in 32 bits, matrices of a batch in 64."""

_SYMMETRIC = Config({"T": 128, "BK": 128, "XCDS": 8}, num_warps=8)
_APPLY = Config({"BM": 256, "BN": 128, "BK": 64, "GROUP": 4, "XCDS": 8}, num_warps=8)

CONFIGS = {
    "newton_schulz_symmetric": {
        "gfx942": _SYMMETRIC,
        "gfx950": _SYMMETRIC,
        "sm_90": Config({"T": 128, "BK": 64, "XCDS": 1}, num_warps=8, num_stages=3),
    },
    "newton_schulz_apply": {
        "gfx942": _APPLY,
        "gfx950": _APPLY,
        "sm_90": Config(
            {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "XCDS": 1}, num_warps=8, num_stages=3
        ),
    },
}
"""For bf16."""

CONFIGS_FP32 = {
    "newton_schulz_symmetric": Config({"T": 64, "BK": 32, "XCDS": 1}),
    "newton_schulz_apply": Config({"BM": 64, "BN": 64, "BK": 32, "GROUP": 8, "XCDS": 1}),
}
"""On every architecture: no matrix unit is fast in fp32, so this is for comparison."""


@dataclass(frozen=True)
class Polynomial:
    """A symmetric [N, n, n], its diagonal apart: that is 3.4 and more while the rest may be small,
    and in bf16 its rounding would be most of the error."""

    rest: Tensor
    """[N, n, n], zero on the diagonal."""
    diagonal: Tensor
    """[N, n], fp32."""

    @classmethod
    def like(cls, x: Tensor) -> Polynomial:
        """Room for one of [n, n] for x [N, n, ...]."""
        shape, device = x.shape[:2], x.device
        rest = torch.empty(*shape, shape[1], dtype=x.dtype, device=device)
        return cls(rest, torch.empty(shape, dtype=torch.float32, device=device))


def gram_of(x: Tensor) -> Tensor:
    """x x^T [N, n, n] of x [N, n, m]."""
    out = torch.empty(*x.shape[:2], x.shape[1], dtype=x.dtype, device=x.device)
    _symmetric((x, x), (None, None), (out, None))
    return out


def polynomial_of(gram: Tensor, coefficients: types.Polynomial) -> Polynomial:
    """a I + b G + c G^2 of G [N, n, n]."""
    a, b, c = coefficients
    out = Polynomial.like(gram)
    _symmetric((gram, gram), (None, None), (out.rest, out.diagonal), (c, b, a))
    return out


def times(polynomial: Polynomial, gram: Tensor) -> Tensor:
    """P G of G [N, n, n] and a polynomial P of it."""
    out = torch.empty_like(gram)
    _symmetric((polynomial.rest, gram), (polynomial.diagonal, None), (out, None))
    return out


def product(left: Polynomial, right: Polynomial) -> Polynomial:
    """P Q of two polynomials of one matrix."""
    out = Polynomial.like(left.rest)
    operands, diagonals = (left.rest, right.rest), (left.diagonal, right.diagonal)
    _symmetric(operands, diagonals, (out.rest, out.diagonal))
    return out


def _symmetric(
    operands: tuple[Tensor, Tensor],
    diagonals: tuple[Tensor | None, Tensor | None],
    outputs: tuple[Tensor, Tensor | None],
    coefficients: types.Polynomial | None = None,
) -> None:
    batch, n, k = operands[0].shape
    config = _config("newton_schulz_symmetric", operands[0])
    side = -(-n // config.blocks["T"])
    tiles = side * (side + 1) // 2
    programs = tiles * batch
    launch(
        newton_schulz_symmetric, (programs,), config,
        *operands, *diagonals, *outputs, n, k, tiles, programs, *(coefficients or (1.0, 0.0, 0.0)),
        POLYNOMIAL=coefficients is not None,
        LEFT=diagonals[0] is not None, RIGHT=diagonals[1] is not None,
    )  # fmt: skip


def apply(polynomial: Polynomial, x: Tensor, dtype: torch.dtype) -> Tensor:
    """P [N, n, n] @ x [N, n, m], in `dtype`."""
    batch, n, m = x.shape
    config = _config("newton_schulz_apply", x)
    tiles_n, tiles_m = -(-n // config.blocks["BM"]), -(-m // config.blocks["BN"])
    programs = tiles_n * tiles_m * batch
    out = torch.empty(batch, n, m, dtype=dtype, device=x.device)
    launch(
        newton_schulz_apply, (programs,), config,
        polynomial.rest, polynomial.diagonal, x, out, n, m, tiles_n, tiles_m, programs,
    )  # fmt: skip
    return out


def newton_schulz_triton(
    matrices: Tensor, polynomials: types.Polynomials, dtype: torch.dtype
) -> Tensor:
    """See `zaya_kernels.newton_schulz.op.newton_schulz`."""
    require_triton("newton_schulz", matrices)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"kernels.newton_schulz: triton computes in fp32 and bf16, not {dtype}")
    if matrices[:1].numel() >= LARGEST:
        raise ValueError(
            f"kernels.newton_schulz: triton takes matrices of less than {LARGEST:,} elements, not "
            f"{list(matrices.shape[1:])}"
        )
    tall = matrices.shape[1] > matrices.shape[2]
    x = _scaled(matrices.transpose(1, 2) if tall else matrices, dtype)
    if x.numel() == 0 or not polynomials:
        out = x.float()
    elif on_gram(x, polynomials):
        out = _by_gram(x, polynomials)
    else:
        out = _by_steps(x, polynomials)
    return out.transpose(1, 2) if tall else out


def _scaled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, n, m] of norm 1, contiguous, turned and rounded in one pass."""
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.div(x, norm, out=out)


def _by_steps(x: Tensor, polynomials: types.Polynomials) -> Tensor:
    for number, coefficients in enumerate(polynomials, start=1):
        polynomial = polynomial_of(gram_of(x), coefficients)
        x = apply(polynomial, x, torch.float32 if number == len(polynomials) else x.dtype)
    return x


def _by_gram(x: Tensor, polynomials: types.Polynomials) -> Tensor:
    taken = 0
    for run in runs(polynomials):
        gram = gram_of(x)
        total = polynomial = polynomial_of(gram, run[0])
        for coefficients in run[1:]:
            # Functions of one matrix: factors change places, and products are symmetric.
            gram = times(polynomial, times(polynomial, gram))
            polynomial = polynomial_of(gram, coefficients)
            total = product(polynomial, total)
        taken += len(run)
        x = apply(total, x, torch.float32 if taken == len(polynomials) else x.dtype)
    return x


def _config(kernel: str, x: Tensor) -> Config:
    arch = architecture(x.device)
    return CONFIGS[kernel][arch] if x.dtype == torch.bfloat16 else CONFIGS_FP32[kernel]


def on_gram(x: Tensor, polynomials: types.Polynomials) -> bool:
    """Whether x [N, n, m], n <= m, is multiplied less on its Gram matrix."""
    size = _config("newton_schulz_symmetric", x).blocks["T"]
    by_steps, by_gram = _multiply_adds(x.shape[1], x.shape[2], polynomials, size)
    return by_gram < by_steps


def operations(n: int, m: int, polynomials: types.Polynomials, arch: str) -> tuple[int, int]:
    """Multiply-adds of the kernels in bf16 for [n, m], n <= m, and of the plain form. A tile on
    the diagonal counts with both of its sides, one at an edge without its padding."""
    size = CONFIGS["newton_schulz_symmetric"][arch].blocks["T"]
    plain = len(polynomials) * (2 * n * n * m + n**3)
    return min(_multiply_adds(n, m, polynomials, size)), plain


def _multiply_adds(n: int, m: int, polynomials: types.Polynomials, size: int) -> tuple[int, int]:
    """By steps and on the Gram matrix, with tiles of `size`."""
    # Elements of the lower triangle of tiles.
    lower = sum(min(size, n - at) * min(at + size, n) for at in range(0, n, size))
    by_gram = 0
    for run in runs(polynomials):
        # Per step the square and, but for the first one, two factors of G and one of the product.
        by_gram += lower * m + (4 * len(run) - 3) * lower * n + n * n * m
    return len(polynomials) * (lower * (m + n) + n * n * m), by_gram
