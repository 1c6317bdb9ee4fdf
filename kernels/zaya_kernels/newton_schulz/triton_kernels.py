"""The two products of Newton-Schulz on matrix units; host side and sources in `triton`.

Accumulation is fp32 and each result is rounded once. Matrices are contiguous; operands enter by
rows, so that both of a symmetric product are read along what is summed over.

Legend: N matrices of n rows and m columns, k summed over, T rows and columns of a tile, BK of k in
one step, XCDS chiplets over which programs are dealt in turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zaya_kernels.triton_kernels import on_chiplets


@triton.jit
def _lower(number):
    """Row and column of tile `number` of a lower triangle, counted along its rows."""
    row = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: at most one off.
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    return row, number - row * (row + 1) // 2


@triton.jit
def newton_schulz_symmetric(
    left, right, left_diagonal, right_diagonal, out, out_diagonal,
    n, k, tiles, programs,
    scale, right_scale, identity,
    T: tl.constexpr, BK: tl.constexpr, XCDS: tl.constexpr,
    POLYNOMIAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """out [N, n, n] = left right^T, known symmetric, for left and right [N, n, k]; `tiles` of the
    lower triangle per matrix, each written twice.

    POLYNOMIAL: scale left right^T + right_scale right + identity I instead. LEFT, RIGHT: that
    operand is a polynomial. The diagonal of a polynomial is kept apart, in fp32 [N, n].
    """
    number = on_chiplets(tl.program_id(0), programs, XCDS)
    i_n = (number // tiles).to(tl.int64)
    row, column = _lower(number % tiles)
    o_i, o_j = row * T + tl.arange(0, T), column * T + tl.arange(0, T)
    o_k = tl.arange(0, BK)
    # Rows past the end are read again and never written.
    p_left = left + i_n * n * k + (tl.minimum(o_i, n - 1)[:, None] * k + o_k[None, :])
    p_right = right + i_n * n * k + (tl.minimum(o_j, n - 1)[:, None] * k + o_k[None, :])
    total = tl.zeros([T, T], tl.float32)
    for start in range(0, k, BK):
        m_k = (o_k < k - start)[None, :]
        b_left = tl.load(p_left + start, mask=m_k, other=0.0)  # [T, BK]
        b_right = tl.load(p_right + start, mask=m_k, other=0.0)
        total = tl.dot(b_left, tl.trans(b_right), total, input_precision="ieee")
    base = i_n * n * n
    o = o_i[:, None] * n + o_j[None, :]
    m = (o_i < n)[:, None] & (o_j < n)[None, :]
    diagonal = o_i[:, None] == o_j[None, :]
    if POLYNOMIAL:
        b_right = tl.load(right + base + o, mask=m, other=0.0).to(tl.float32)  # [T, T]
        total = total * scale + right_scale * b_right + tl.where(diagonal, identity, 0.0)
    if LEFT:
        b_d = tl.load(left_diagonal + i_n * n + o_i, mask=o_i < n, other=0.0)[:, None]
        total += b_d * tl.load(right + base + o, mask=m, other=0.0).to(tl.float32)
    if RIGHT:
        b_e = tl.load(right_diagonal + i_n * n + o_j, mask=o_j < n, other=0.0)[None, :]
        total += b_e * tl.load(left + base + o, mask=m, other=0.0).to(tl.float32)
        total += tl.where(diagonal, b_d * b_e, 0.0)
    if POLYNOMIAL or RIGHT:
        if row == column:
            b_diagonal = tl.sum(tl.where(diagonal, total, 0.0), axis=1)
            tl.store(out_diagonal + i_n * n + o_i, b_diagonal, mask=o_i < n)
        total = tl.where(diagonal, 0.0, total)
    b_out = total.to(out.dtype.element_ty)
    tl.store(out + base + o, b_out, mask=m)
    if row > column:
        o_turned = o_j[:, None] * n + o_i[None, :]
        m_turned = (o_j < n)[:, None] & (o_i < n)[None, :]
        tl.store(out + base + o_turned, tl.trans(b_out), mask=m_turned)


@triton.jit
def newton_schulz_apply(
    polynomial, diagonal, x, out,
    n, m, tiles_n, tiles_m, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    XCDS: tl.constexpr,
):  # fmt: skip
    """out [N, n, m] = (polynomial [N, n, n] + its diagonal [N, n]) x [N, n, m]; tiles run down
    GROUP rows of tiles before they go on to the next column, so that both operands stay in cache.
    """
    tiles = tiles_n * tiles_m
    number = on_chiplets(tl.program_id(0), programs, XCDS)
    i_n = (number // tiles).to(tl.int64)
    number = number % tiles
    above = number // (GROUP * tiles_m) * GROUP
    height = tl.minimum(tiles_n - above, GROUP)
    within = number - above * tiles_m
    o_i = (above + within % height) * BM + tl.arange(0, BM)
    o_j = (within // height) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_j = (o_j < m)[None, :]
    p_polynomial = polynomial + i_n * n * n + (tl.minimum(o_i, n - 1)[:, None] * n + o_k[None, :])
    p_x = x + i_n * n * m + (o_k[:, None] * m + o_j[None, :])
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, n, BK):
        b_p = tl.load(p_polynomial + start, mask=(o_k < n - start)[None, :], other=0.0)  # [BM, BK]
        b_x = tl.load(p_x + start * m, mask=(o_k < n - start)[:, None] & m_j, other=0.0)
        total = tl.dot(b_p, b_x, total, input_precision="ieee")  # [BM, BN]
    base = i_n * n * m
    o = o_i[:, None] * m + o_j[None, :]
    inside = (o_i < n)[:, None] & m_j
    b_d = tl.load(diagonal + i_n * n + o_i, mask=o_i < n, other=0.0)[:, None]
    total += b_d * tl.load(x + base + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + base + o, total.to(out.dtype.element_ty), mask=inside)
