"""Triton kernels of the experts' MLP. Where they are launched from: `triton`.

Legend: R rows sorted by expert, E experts, D hidden, F expert width; a product's tile is BM rows by
BN columns, summed in steps of BK. Row numbers are int64 wherever they become addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zaya_kernels.triton_kernels import on_chiplets


@triton.jit
def grouped_mlp_plan(
    counts, offsets, tiles,
    num_experts, max_tiles, EXPERTS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Program e writes the tiles of expert e: [max_tiles, 3] expert, first row, rows from there to
    the expert's end; and offsets [E + 2]: each expert's first row, all rows, all tiles."""
    i = tl.program_id(0)
    o_e = tl.arange(0, EXPERTS)
    b_counts = tl.load(counts + o_e, mask=o_e < num_experts, other=0).to(tl.int32)
    b_tiles = (b_counts + BM - 1) // BM
    before = o_e < i
    row = tl.sum(tl.where(before, b_counts, 0), axis=0)
    tile = tl.sum(tl.where(before, b_tiles, 0), axis=0)
    count = tl.sum(tl.where(o_e == i, b_counts, 0), axis=0)
    tl.store(offsets + i, row)
    if i == num_experts:
        tl.store(offsets + i + 1, tile)
    o = tl.arange(0, 64)
    for first in range(0, count, BM * 64):
        o_row = first + o * BM
        m = (o_row < count) & (tile + first // BM + o < max_tiles)
        p_tile = tiles + (tile + first // BM + o) * 3
        tl.store(p_tile, i + tl.zeros([64], tl.int32), mask=m)
        tl.store(p_tile + 1, row + o_row, mask=m)
        tl.store(p_tile + 2, count - o_row, mask=m)


@triton.jit
def _in_groups(i, rows, columns, GROUP: tl.constexpr):
    """Row and column of tile i: down GROUP rows, then on to the next column, so that neighbours
    share operands in a cache."""
    first = i // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    within = i - first * columns
    return first + within % size, within // size


@triton.jit
def _columns(first, N: tl.constexpr, BN: tl.constexpr):
    """Columns of a tile; behind the last one others stand, in eights where there are only whole
    ones, so that loads stay 16 bytes wide."""
    o_n = first + tl.arange(0, BN)
    if N % BN == 0:
        return o_n
    if N % 8:
        return tl.minimum(o_n, N - 1)
    return tl.max_contiguous(tl.multiple_of(o_n % N, 8), 8)


@triton.jit
def _product(
    p_a, o_a, p_b, o_b, acc,
    step, K: tl.constexpr, STEP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + a [BM, K] @ b [K, BN]; o_a [BM, 1] and o_b [1, BN] lead to rows of a and
    columns of b. From one of the K to the next it is 1 in a and STEP in b.

    `step` is STEP again, at run time: of rows a constant apart the compiler keeps one address and
    adds to it in the loop, one instruction more than an address for each.
    """
    o_k = tl.arange(0, BK)
    p_a += o_a
    o_b += (o_k * step)[:, None]
    for _ in range(K // BK):
        b_b = tl.load(p_b + o_b)
        b_a = tl.load(p_a + o_k[None, :])
        acc = tl.dot(b_a, b_b, acc, input_precision="ieee")
        p_a += BK
        p_b += BK * STEP
    if K % BK:
        m_k = o_k < K % BK
        b_b = tl.load(p_b + o_b, mask=m_k[:, None], other=0.0)
        b_a = tl.load(p_a + o_k[None, :], mask=m_k[None, :], other=0.0)
        acc = tl.dot(b_a, b_b, acc, input_precision="ieee")
    return acc


@triton.jit
def _sigmoid(x):
    """A division proper takes ten instructions and their registers."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _inside(o_m, left, o_n, N: tl.constexpr, TILE: tl.constexpr):
    """Which elements of (a part of) a tile of TILE columns exist."""
    m = (o_m < left)[:, None]
    if N % TILE:
        m = m & (o_n < N)[None, :]
    return m


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """Left and right half of x [M, N]."""
    return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), (0, 2, 1)))


@triton.jit
def _swiglu(
    gate, up, hidden, activated, row, left, first,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    KEEP: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    """Store columns [BM, BN] of both halves of the pre-activation, from `first`, and of what they
    give."""
    o_m = tl.arange(0, BM)
    o_n = first + tl.arange(0, BN)
    m = _inside(o_m, left, o_n, F, TILE)
    if KEEP:
        p_hidden = hidden + row * (2 * F)
        o_hidden = (o_m * (2 * F))[:, None] + o_n[None, :]
        tl.store(p_hidden + o_hidden, gate.to(hidden.dtype.element_ty), mask=m)
        tl.store(p_hidden + F + o_hidden, up.to(hidden.dtype.element_ty), mask=m)
    if ACTIVATE:
        b_out = (gate * _sigmoid(gate) * up).to(activated.dtype.element_ty)
        tl.store(activated + row * F + ((o_m * F)[:, None] + o_n[None, :]), b_out, mask=m)


@triton.jit
def _up(
    rows, gate_up, hidden, activated, offsets, tiles, num_experts,
    D: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr, ACTIVATE: tl.constexpr,
    GROUP: tl.constexpr, XCDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """hidden [R, 2F], the products with gate and up, if KEEP; activated [R, F] if ACTIVATE. In
    halves if PARTS is 2, for the registers."""
    columns = tl.cdiv(F, BN)
    num_tiles = tl.load(offsets + num_experts + 1)
    i = on_chiplets(tl.program_id(0), num_tiles * columns, XCDS)
    i_tile, i_n = _in_groups(i, num_tiles, columns, GROUP)
    expert = tl.cast(tl.load(tiles + i_tile * 3), tl.int64)
    row = tl.cast(tl.load(tiles + i_tile * 3 + 1), tl.int64)
    left = tl.load(tiles + i_tile * 3 + 2)
    o_m = tl.arange(0, BM)
    o_n = _columns(i_n * BN, F, BN)
    o_k = tl.arange(0, BK)
    o_a = (tl.minimum(o_m, left - 1) * D)[:, None]
    o_b = (o_n * D)[None, :]
    p_x = rows + row * D
    p_gate = gate_up + expert * (2 * F * D)
    p_up = p_gate + F * D
    a_gate = tl.zeros([BM, BN], tl.float32)
    a_up = tl.zeros([BM, BN], tl.float32)
    for _ in range(D // BK):
        b_x = tl.load(p_x + (o_a + o_k[None, :]))
        b_gate = tl.load(p_gate + (o_k[:, None] + o_b))
        b_up = tl.load(p_up + (o_k[:, None] + o_b))
        a_gate = tl.dot(b_x, b_gate, a_gate, input_precision="ieee")
        a_up = tl.dot(b_x, b_up, a_up, input_precision="ieee")
        p_x += BK
        p_gate += BK
        p_up += BK
    if D % BK:
        m_k = o_k < D % BK
        b_x = tl.load(p_x + (o_a + o_k[None, :]), mask=m_k[None, :], other=0.0)
        b_gate = tl.load(p_gate + (o_k[:, None] + o_b), mask=m_k[:, None], other=0.0)
        b_up = tl.load(p_up + (o_k[:, None] + o_b), mask=m_k[:, None], other=0.0)
        a_gate = tl.dot(b_x, b_gate, a_gate, input_precision="ieee")
        a_up = tl.dot(b_x, b_up, a_up, input_precision="ieee")
    first = i_n * BN
    if PARTS == 1:
        _swiglu(a_gate, a_up, hidden, activated, row, left, first, F, BM, BN, BN, KEEP, ACTIVATE)
    else:
        b_gate, b_gate_right = _halves(a_gate, BM, BN)
        b_up, b_up_right = _halves(a_up, BM, BN)
        _swiglu(
            b_gate, b_up, hidden, activated, row, left, first, F, BM, BN // 2, BN,
            KEEP, ACTIVATE,
        )  # fmt: skip
        first += BN // 2
        _swiglu(
            b_gate_right, b_up_right, hidden, activated, row, left, first, F, BM, BN // 2, BN,
            KEEP, ACTIVATE,
        )  # fmt: skip


@triton.jit
def grouped_mlp_up(
    rows, gate_up, hidden, activated, offsets, tiles, num_experts,
    D: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """activated [R, F] = silu(rows @ gate.T) * (rows @ up.T); hidden [R, 2F] if KEEP."""
    if tl.program_id(0) < tl.load(offsets + num_experts + 1) * tl.cdiv(F, BN):
        _up(
            rows, gate_up, hidden, activated, offsets, tiles, num_experts,
            D, F, KEEP, True, GROUP, XCDS, BM, BN, BK, PARTS,
        )  # fmt: skip


@triton.jit
def grouped_mlp_up_again(
    rows, gate_up, hidden, offsets, tiles, num_experts,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """hidden [R, 2F] alone, for a backward pass whose forward did not keep it."""
    if tl.program_id(0) < tl.load(offsets + num_experts + 1) * tl.cdiv(F, BN):
        _up(
            rows, gate_up, hidden, None, offsets, tiles, num_experts,
            D, F, True, False, GROUP, XCDS, BM, BN, BK, PARTS,
        )  # fmt: skip


@triton.jit
def _rows_by_matrix(
    a, matrices, out, step_k, offsets, tiles, num_experts,
    N: tl.constexpr, K: tl.constexpr, STEP_N: tl.constexpr, STEP_K: tl.constexpr,
    GROUP: tl.constexpr, XCDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [R, N] = a [R, K] @ an expert's matrix, whose elements are STEP_N and STEP_K = step_k
    apart."""
    columns = tl.cdiv(N, BN)
    num_tiles = tl.load(offsets + num_experts + 1)
    if tl.program_id(0) < num_tiles * columns:
        i = on_chiplets(tl.program_id(0), num_tiles * columns, XCDS)
        i_tile, i_n = _in_groups(i, num_tiles, columns, GROUP)
        expert = tl.cast(tl.load(tiles + i_tile * 3), tl.int64)
        row = tl.cast(tl.load(tiles + i_tile * 3 + 1), tl.int64)
        left = tl.load(tiles + i_tile * 3 + 2)
        o_m = tl.arange(0, BM)
        acc = _product(
            a + row * K, (tl.minimum(o_m, left - 1) * K)[:, None],
            matrices + expert * (N * K), (_columns(i_n * BN, N, BN) * STEP_N)[None, :],
            tl.zeros([BM, BN], tl.float32), step_k, K, STEP_K, BK,
        )  # fmt: skip
        o_n = i_n * BN + tl.arange(0, BN)
        m = _inside(o_m, left, o_n, N, BN)
        p_out = out + row * N + ((o_m * N)[:, None] + o_n[None, :])
        tl.store(p_out, acc.to(out.dtype.element_ty), mask=m)


@triton.jit
def grouped_mlp_down(
    activated, down, out, offsets, tiles, num_experts,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [R, D] = activated [R, F] @ down.T, down [E, D, F]."""
    _rows_by_matrix(
        activated, down, out, 1, offsets, tiles, num_experts,
        D, F, F, 1, GROUP, XCDS, BM, BN, BK,
    )  # fmt: skip


@triton.jit
def grouped_mlp_grad_rows(
    grad_hidden, gate_up, grad_rows, hidden_size, offsets, tiles, num_experts,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grad_rows [R, D] = grad_hidden [R, 2F] @ gate_up, gate_up [E, 2F, D]; hidden_size is D."""
    _rows_by_matrix(
        grad_hidden, gate_up, grad_rows, hidden_size, offsets, tiles, num_experts,
        D, 2 * F, 1, D, GROUP, XCDS, BM, BN, BK,
    )  # fmt: skip


@triton.jit
def _through_swiglu(
    acc, hidden, grad_hidden, activated, row, left, first,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Columns [BM, BN] of the activation's gradient, from `first`: to both halves of the
    pre-activation's; and the activation made again."""
    o_m = tl.arange(0, BM)
    o_n = first + tl.arange(0, BN)
    m = _inside(o_m, left, o_n, F, TILE)
    o_hidden = (o_m * (2 * F))[:, None] + o_n[None, :]
    p_hidden = hidden + row * (2 * F)
    p_grad = grad_hidden + row * (2 * F)
    p_out = activated + row * F + ((o_m * F)[:, None] + o_n[None, :])
    dtype = activated.dtype.element_ty
    b_gate = tl.load(p_hidden + o_hidden, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_hidden + F + o_hidden, mask=m, other=0.0).to(tl.float32)
    b_sigmoid = _sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    tl.store(p_out, (b_silu * b_up).to(dtype), mask=m)
    tl.store(p_grad + F + o_hidden, (acc * b_silu).to(dtype), mask=m)
    # d silu(g) / dg = s + silu(g) (1 - s) with s = sigmoid(g).
    slope = b_sigmoid + b_silu * (1.0 - b_sigmoid)
    tl.store(p_grad + o_hidden, (acc * b_up * slope).to(dtype), mask=m)


@triton.jit
def _quarters_through_swiglu(
    acc, hidden, grad_hidden, activated, row, left, first,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`_through_swiglu`, a quarter of the columns after the other."""
    PART: tl.constexpr = BN // 4
    b_left, b_right = _halves(acc, BM, BN)
    b_0, b_1 = _halves(b_left, BM, BN // 2)
    b_2, b_3 = _halves(b_right, BM, BN // 2)
    _through_swiglu(b_0, hidden, grad_hidden, activated, row, left, first, F, BM, PART, TILE)
    first += PART
    _through_swiglu(b_1, hidden, grad_hidden, activated, row, left, first, F, BM, PART, TILE)
    first += PART
    _through_swiglu(b_2, hidden, grad_hidden, activated, row, left, first, F, BM, PART, TILE)
    first += PART
    _through_swiglu(b_3, hidden, grad_hidden, activated, row, left, first, F, BM, PART, TILE)


@triton.jit
def grouped_mlp_grad_hidden(
    grad, down, hidden, grad_hidden, activated, width, offsets, tiles, num_experts,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient [R, F] = grad [R, D] @ down of the activation goes through SwiGLU as it is, in
    fp32: grad_hidden [R, 2F]; activated [R, F] is made again on the way; width is F."""
    columns = tl.cdiv(F, BN)
    num_tiles = tl.load(offsets + num_experts + 1)
    if tl.program_id(0) >= num_tiles * columns:
        return
    i = on_chiplets(tl.program_id(0), num_tiles * columns, XCDS)
    i_tile, i_n = _in_groups(i, num_tiles, columns, GROUP)
    expert = tl.cast(tl.load(tiles + i_tile * 3), tl.int64)
    row = tl.cast(tl.load(tiles + i_tile * 3 + 1), tl.int64)
    left = tl.load(tiles + i_tile * 3 + 2)
    o_m = tl.arange(0, BM)
    acc = _product(
        grad + row * D, (tl.minimum(o_m, left - 1) * D)[:, None],
        down + expert * (D * F), _columns(i_n * BN, F, BN)[None, :],
        tl.zeros([BM, BN], tl.float32), width, D, F, BK,
    )  # fmt: skip
    # In eighths, so that SwiGLU does not need more registers than the product.
    b_left, b_right = _halves(acc, BM, BN)
    first = i_n * BN
    _quarters_through_swiglu(
        b_left, hidden, grad_hidden, activated, row, left, first, F, BM, BN // 2, BN
    )
    first += BN // 2
    _quarters_through_swiglu(
        b_right, hidden, grad_hidden, activated, row, left, first, F, BM, BN // 2, BN
    )


@triton.jit
def _put(
    acc, p_out, o_m, first,
    M: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Columns of a tile, from `first`, to where they belong in an [M, N]."""
    o_n = first + tl.arange(0, BN)
    m = _inside(o_m, M, o_n, N, TILE)
    o = (o_m * N)[:, None] + o_n[None, :]
    if ADD:
        acc += tl.load(p_out + o, mask=m, other=0.0)
    tl.store(p_out + o, acc.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _rows_against_rows(
    out, left, right, offsets, num_experts,
    M: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr,
    GROUP: tl.constexpr, XCDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [E, M, N] = left.T @ right over an expert's rows, left [R, M] and right [R, N]; added to
    what `out` holds if ADD. Experts without rows get zeros."""
    per_expert = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    i = on_chiplets(tl.program_id(0), num_experts * per_expert, XCDS)
    expert = i // per_expert
    i_m, i_n = _in_groups(i % per_expert, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row = tl.load(offsets + expert)
    count = tl.load(offsets + expert + 1) - row
    row = tl.cast(row, tl.int64)
    o_k = tl.arange(0, BK)
    p_a = left + row * M + _columns(i_m * BM, M, BM)[:, None]
    p_b = right + row * N + _columns(i_n * BN, N, BN)[None, :]
    o_a = (o_k * M)[None, :]
    o_b = (o_k * N)[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in range(count // BK):
        acc = tl.dot(tl.load(p_a + o_a), tl.load(p_b + o_b), acc, input_precision="ieee")
        p_a += BK * M
        p_b += BK * N
    if count % BK > 0:
        m_k = o_k < count % BK
        b_a = tl.load(p_a + o_a, mask=m_k[None, :], other=0.0)
        b_b = tl.load(p_b + o_b, mask=m_k[:, None], other=0.0)
        acc = tl.dot(b_a, b_b, acc, input_precision="ieee")
    p_out = out + tl.cast(expert, tl.int64) * (M * N)
    o_m = i_m * BM + tl.arange(0, BM)
    first = i_n * BN
    if ADD:
        # In quarters, for the registers.
        PART: tl.constexpr = BN // 4
        b_left, b_right = _halves(acc, BM, BN)
        b_0, b_1 = _halves(b_left, BM, BN // 2)
        b_2, b_3 = _halves(b_right, BM, BN // 2)
        _put(b_0, p_out, o_m, first, M, N, PART, BN, ADD)
        _put(b_1, p_out, o_m, first + PART, M, N, PART, BN, ADD)
        _put(b_2, p_out, o_m, first + 2 * PART, M, N, PART, BN, ADD)
        _put(b_3, p_out, o_m, first + 3 * PART, M, N, PART, BN, ADD)
    else:
        _put(acc, p_out, o_m, first, M, N, BN, BN, ADD)


@triton.jit
def grouped_mlp_grad_gate_up(
    grad_gate_up, grad_hidden, rows, offsets, num_experts,
    D: tl.constexpr, F: tl.constexpr, ADD: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grad_gate_up [E, 2F, D] from grad_hidden [R, 2F] and rows [R, D]."""
    _rows_against_rows(
        grad_gate_up, grad_hidden, rows, offsets, num_experts,
        2 * F, D, ADD, GROUP, XCDS, BM, BN, BK,
    )  # fmt: skip


@triton.jit
def grouped_mlp_grad_down(
    grad_down, grad, activated, offsets, num_experts,
    D: tl.constexpr, F: tl.constexpr, ADD: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grad_down [E, D, F] from grad [R, D] and activated [R, F]."""
    _rows_against_rows(
        grad_down, grad, activated, offsets, num_experts,
        D, F, ADD, GROUP, XCDS, BM, BN, BK,
    )  # fmt: skip
