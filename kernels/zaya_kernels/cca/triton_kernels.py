"""The CCA forward kernel, and what it shares with the backward; what they compute and how:
`zaya_kernels.cca.triton`.

A head's d output channels are handled as two halves a and b that hold the two partners of every
rotated pair in the same column; unrotated channels fill the rest.

Legend: n chunks per row, L tokens per chunk, T rows of a block, H query heads, K KV heads,
G = H / K heads of a group, A = H + K, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1.1920928955078125e-07)  # torch.finfo(torch.float32).eps, the norm's floor


@triton.jit
def _columns(HALF: tl.constexpr, D: tl.constexpr):
    """Channels of the halves a and b: the first HALF of each are partners in the rotation."""
    j = tl.arange(0, D // 2)
    o_a = tl.where(j < HALF, j, j + HALF)
    o_b = tl.where(j < HALF, j + HALF, j + D // 2)
    return tl.max_contiguous(tl.multiple_of(o_a, 8), 8), tl.max_contiguous(
        tl.multiple_of(o_b, 8), 8
    )


@triton.jit
def rows_of(
    qk, halo, o_r, o_c, m_r, first, back, stride_row,
    C: tl.constexpr, TAPS: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """Rows `back` before o_r, columns o_c. `qk` points TAPS - 1 rows before the block's first row,
    `halo` where the row before the chunk would end; rows before the chunk come from the halo."""
    o_back = o_r + (TAPS - 1 - back)
    row = first + o_r - back
    x = tl.load(qk + o_back * stride_row + o_c, mask=m_r & (row >= 0), other=0.0)
    if HALO:
        o_halo = tl.maximum(row + TAPS - 1, 0)
        before = tl.load(halo + o_halo * C + o_c, mask=m_r & (row < 0), other=0.0)
        x = tl.where(row < 0, before, x)
    return x


@triton.jit
def _convolved(
    qk, halo, weight, constant, i_head, o_r, o_a, o_b, position, first, stride_row,
    A: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """Taps of one head and half of its own mean, [T, d / 2] twice."""
    o_k = tl.arange(0, D)
    a = tl.zeros([o_r.shape[0], D // 2], tl.float32) + tl.load(constant + i_head * D + o_a)[None, :]
    b = tl.zeros([o_r.shape[0], D // 2], tl.float32) + tl.load(constant + i_head * D + o_b)[None, :]
    for back in tl.static_range(TAPS):
        x = rows_of(
            qk + i_head * D, halo + i_head * D, o_r, o_k[None, :], position >= back, first, back,
            stride_row, A * D, TAPS, HALO,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            w = weight + ((part * A + i_head) * TAPS + back) * D * D + o_k[:, None]
            a = tl.dot(x, tl.load(w + o_a[None, :] * D), a, input_precision="ieee")
            b = tl.dot(x, tl.load(w + o_b[None, :] * D), b, input_precision="ieee")
    return a, b


@triton.jit
def own(qk, halo, i_head, o_r, o_c, position, first, stride_row,
         A: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr):  # fmt: skip
    """This token's own channels of a head, fp32; the halo is never this token."""
    m_r = position >= 0
    return rows_of(
        qk + i_head * D, halo, o_r, o_c[None, :], m_r, first, 0, stride_row, A * D, TAPS, False
    ).to(tl.float32)


@triton.jit
def _mixed_query(
    qk, halo, weight, constant, i_group, i_head, o_r, o_a, o_b, position, first, stride_row,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr,
    HALO: tl.constexpr,
):  # fmt: skip
    """Unnormalised query: taps, and half of the group's key."""
    A: tl.constexpr = H + K
    a, b = _convolved(
        qk, halo, weight, constant, i_head, o_r, o_a, o_b, position, first, stride_row,
        A, D, TAPS, PARTS, HALO,
    )  # fmt: skip
    i_key = H + i_group
    a += 0.5 * own(qk, halo, i_key, o_r, o_a, position, first, stride_row, A, D, TAPS)
    b += 0.5 * own(qk, halo, i_key, o_r, o_b, position, first, stride_row, A, D, TAPS)
    return a, b


@triton.jit
def _mixed_key(
    qk, halo, weight, constant, i_group, o_r, o_a, o_b, position, first, stride_row,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr,
    HALO: tl.constexpr,
):  # fmt: skip
    """Unnormalised key: taps, and half of the mean of the group's queries."""
    A: tl.constexpr = H + K
    G: tl.constexpr = H // K
    a, b = _convolved(
        qk, halo, weight, constant, H + i_group, o_r, o_a, o_b, position, first, stride_row,
        A, D, TAPS, PARTS, HALO,
    )  # fmt: skip
    for i in range(G):
        i_query = i_group * G + i
        x_a = own(qk, halo, i_query, o_r, o_a, position, first, stride_row, A, D, TAPS)
        x_b = own(qk, halo, i_query, o_r, o_b, position, first, stride_row, A, D, TAPS)
        a += x_a * (0.5 / G)
        b += x_b * (0.5 / G)
    return a, b


@triton.jit
def _angles(cos, sin, o_r, m_r, HALF: tl.constexpr, D: tl.constexpr):
    """Cosines and sines [T, d / 2]; 1 and 0 in the columns that are not rotated."""
    j = tl.arange(0, D // 2)[None, :]
    m = m_r & (j < HALF)
    b_cos = tl.load(cos + o_r * HALF + j, mask=m, other=1.0)
    return b_cos, tl.load(sin + o_r * HALF + j, mask=m, other=0.0)


@triton.jit
def _length(a, b):
    return tl.sqrt(tl.sum(a * a, axis=1, keep_dims=True) + tl.sum(b * b, axis=1, keep_dims=True))


@triton.jit
def positions_of(positions, o_r, first, length):
    """Position of each row in its document; -1 for rows outside the chunk."""
    m = (first + o_r >= 0) & (first + o_r < length)
    return tl.load(positions + o_r, mask=m, other=-1).to(tl.int32)


@triton.jit
def _shifted_values(
    v_now, v_delayed, halo_v, o_r, o_c, position, first, stride_row,
    WIDTH: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """Channels o_c of [v_now of this token ; v_delayed of the one before]."""
    now = o_c < WIDTH
    b_v = tl.load(v_now + o_r * stride_row + o_c, mask=now & (position >= 0), other=0.0)
    late = (o_c >= WIDTH) & (position > 0)
    o_d = tl.maximum(o_c - WIDTH, 0)
    row = first + o_r - 1
    # v_delayed points one row before the block.
    x = tl.load(v_delayed + o_r * stride_row + o_d, mask=late & (row >= 0), other=0.0)
    if HALO:
        x = tl.where(row < 0, tl.load(halo_v + o_d, mask=late & (row < 0), other=0.0), x)
    return tl.where(now, b_v, x)


@triton.jit
def _store_turned(out, o_row, o_a, o_b, a, b, b_cos, b_sin, position):
    """Rotate and store."""
    m = position >= 0
    turned = a * b_cos - b * b_sin
    tl.store(out + o_row + o_a[None, :], turned.to(out.dtype.element_ty), mask=m)
    turned = b * b_cos + a * b_sin
    tl.store(out + o_row + o_b[None, :], turned.to(out.dtype.element_ty), mask=m)


@triton.jit
def cca_forward(
    qk, v_now, v_delayed, halo_qk, halo_v, positions, cos, sin, weight, constant, temperature,
    q, k, v,
    length, chunks, stride_batch, stride_row, v_batch, v_row,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TAPS: tl.constexpr,
    PARTS: tl.constexpr, HALO: tl.constexpr, HALO_ROWS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    tl.assume(stride_row > 0)
    tl.assume(v_row > 0)
    A: tl.constexpr = H + K
    G: tl.constexpr = H // K
    i_group, i_block, i_chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = i_block * T
    o_r = tl.arange(0, T)[:, None]
    o_a, o_b = _columns(HALF, D)
    # Whole rows before this block: of the chunk's batch row, and of the packed [B, n, L].
    before = (i_chunk % chunks).to(tl.int64) * length + first
    i_batch = (i_chunk // chunks).to(tl.int64)
    token = i_chunk.to(tl.int64) * length + first
    position = positions_of(positions + token, o_r, first, length)
    p_qk = qk + i_batch * stride_batch + (before - (TAPS - 1)) * stride_row
    p_halo = halo_qk
    p_late = halo_v
    if HALO:
        p_halo = halo_qk + (i_chunk.to(tl.int64) * HALO_ROWS + HALO_ROWS - (TAPS - 1)) * A * D
        p_late = halo_v + i_chunk.to(tl.int64) * (K * D // 2)
    b_cos, b_sin = _angles(cos + token * HALF, sin + token * HALF, o_r, position >= 0, HALF, D)
    for i in range(G):
        i_head = i_group * G + i
        a, b = _mixed_query(
            p_qk, p_halo, weight, constant, i_group, i_head, o_r, o_a, o_b, position, first,
            stride_row, H, K, D, TAPS, PARTS, HALO,
        )  # fmt: skip
        scale = D**0.5 / tl.maximum(_length(a, b), EPS)
        p_out = q + (token * H + i_head) * D
        _store_turned(p_out, o_r * (H * D), o_a, o_b, a * scale, b * scale, b_cos, b_sin, position)
    a, b = _mixed_key(
        p_qk, p_halo, weight, constant, i_group, o_r, o_a, o_b, position, first, stride_row,
        H, K, D, TAPS, PARTS, HALO,
    )  # fmt: skip
    scale = D**0.5 / tl.maximum(_length(a, b), EPS) * tl.load(temperature + i_group).to(tl.float32)
    p_out = k + (token * K + i_group) * D
    _store_turned(p_out, o_r * (K * D), o_a, o_b, a * scale, b * scale, b_cos, b_sin, position)
    o_v = i_group * D + tl.arange(0, D)[None, :]
    p_v = i_batch * v_batch + before * v_row
    b_v = _shifted_values(
        v_now + p_v, v_delayed + p_v - v_row, p_late, o_r, o_v, position, first, v_row,
        K * D // 2, HALO,
    )  # fmt: skip
    tl.store(v + token * K * D + o_r * (K * D) + o_v, b_v, mask=position >= 0)
