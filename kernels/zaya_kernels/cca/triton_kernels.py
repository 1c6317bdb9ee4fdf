"""The CCA kernels; what they compute and how: `zaya_kernels.cca.triton`.

A head's d output channels are handled as two halves a and b that hold the two partners of every
rotated pair in the same column; unrotated channels fill the rest.

Legend: n chunks per row, L tokens per chunk, T rows of a block, H query heads, K KV heads,
G = H / K heads of a group, A = H + K, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

_EPS = tl.constexpr(1.1920928955078125e-07)  # torch.finfo(torch.float32).eps, the norm's floor


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
def _rows(
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
        x = _rows(
            qk + i_head * D, halo + i_head * D, o_r, o_k[None, :], position >= back, first, back,
            stride_row, A * D, TAPS, HALO,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            w = weight + ((part * A + i_head) * TAPS + back) * D * D + o_k[:, None]
            a = tl.dot(x, tl.load(w + o_a[None, :] * D), a, input_precision="ieee")
            b = tl.dot(x, tl.load(w + o_b[None, :] * D), b, input_precision="ieee")
    return a, b


@triton.jit
def _own(qk, halo, i_head, o_r, o_c, position, first, stride_row,
         A: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr):  # fmt: skip
    """This token's own channels of a head, fp32; the halo is never this token."""
    m_r = position >= 0
    return _rows(
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
    a += 0.5 * _own(qk, halo, i_key, o_r, o_a, position, first, stride_row, A, D, TAPS)
    b += 0.5 * _own(qk, halo, i_key, o_r, o_b, position, first, stride_row, A, D, TAPS)
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
        x_a = _own(qk, halo, i_query, o_r, o_a, position, first, stride_row, A, D, TAPS)
        x_b = _own(qk, halo, i_query, o_r, o_b, position, first, stride_row, A, D, TAPS)
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
def _positions(positions, o_r, first, length):
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
    position = _positions(positions + token, o_r, first, length)
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
        scale = D**0.5 / tl.maximum(_length(a, b), _EPS)
        p_out = q + (token * H + i_head) * D
        _store_turned(p_out, o_r * (H * D), o_a, o_b, a * scale, b * scale, b_cos, b_sin, position)
    a, b = _mixed_key(
        p_qk, p_halo, weight, constant, i_group, o_r, o_a, o_b, position, first, stride_row,
        H, K, D, TAPS, PARTS, HALO,
    )  # fmt: skip
    scale = D**0.5 / tl.maximum(_length(a, b), _EPS) * tl.load(temperature + i_group).to(tl.float32)
    p_out = k + (token * K + i_group) * D
    _store_turned(p_out, o_r * (K * D), o_a, o_b, a * scale, b * scale, b_cos, b_sin, position)
    o_v = i_group * D + tl.arange(0, D)[None, :]
    p_v = i_batch * v_batch + before * v_row
    b_v = _shifted_values(
        v_now + p_v, v_delayed + p_v - v_row, p_late, o_r, o_v, position, first, v_row,
        K * D // 2, HALO,
    )  # fmt: skip
    tl.store(v + token * K * D + o_r * (K * D) + o_v, b_v, mask=position >= 0)


@triton.jit
def _unnormalised_gradient(
    grad, o_row, o_a, o_b, a, b, b_cos, b_sin, position, temperature, D: tl.constexpr
):
    """Gradient of a mixed head (halves a, b) from that of the rotated output; and, per row, the
    share of the temperature's gradient."""
    m = position >= 0
    g_a = tl.load(grad + o_row + o_a[None, :], mask=m, other=0.0).to(tl.float32)
    g_b = tl.load(grad + o_row + o_b[None, :], mask=m, other=0.0).to(tl.float32)
    u_a, u_b = g_a * b_cos + g_b * b_sin, g_b * b_cos - g_a * b_sin
    norm = _length(a, b)
    floor = tl.maximum(norm, _EPS)
    dot = tl.sum(u_a * a, axis=1, keep_dims=True) + tl.sum(u_b * b, axis=1, keep_dims=True)
    share = dot * (D**0.5 / floor)
    scale = temperature * (D**0.5 / floor)
    # Below the floor of the norm the scale is a constant.
    pull = tl.where(norm > _EPS, dot * scale / (floor * floor), 0.0)
    return u_a * scale - a * pull, u_b * scale - b * pull, share


@triton.jit
def _high(x):
    """The upper 16 bits of fp32 as bf16: cheaper than rounding, which is software on gfx942."""
    return ((x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _product(x, w, w_low, accumulator, PARTS: tl.constexpr):
    """accumulator + x (w + w_low), x fp32; without the product of the two low parts."""
    if PARTS == 1:
        return tl.dot(x, w, accumulator, input_precision="ieee")
    else:
        high = _high(x)
        accumulator = tl.dot(_high(x - high.to(tl.float32)), w, accumulator)
        accumulator = tl.dot(high, w_low, accumulator)
        return tl.dot(high, w, accumulator)


@triton.jit
def _transposed(
    g_a, g_b, turned, i_head, o_r, o_a, o_b, position,
    A: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradient of a head's own input rows: every tap's gradient, moved back by its delay. The last
    TAPS - 1 rows of the block lack what comes from the next one. `turned` holds the tap matrices
    as [d_in, d_out], so that both operands are contiguous along the summed dimension."""
    x_a = tl.zeros([T, D // 2], tl.float32)
    x_b = tl.zeros([T, D // 2], tl.float32)
    for back in tl.static_range(TAPS):
        later = tl.minimum(o_r + back, T - 1) + tl.zeros([T, D // 2], tl.int32)
        s_a = tl.where(position >= back, g_a, 0.0)
        s_b = tl.where(position >= back, g_b, 0.0)
        if back > 0:
            s_a, s_b = tl.gather(s_a, later, axis=0), tl.gather(s_b, later, axis=0)
        w = turned + (i_head * TAPS + back) * D * D
        low = w + (PARTS - 1) * A * TAPS * D * D
        # o_ab: from output channels a to input channels b.
        o_aa, o_ab = o_a[:, None] + o_a[None, :] * D, o_a[:, None] + o_b[None, :] * D
        o_ba, o_bb = o_b[:, None] + o_a[None, :] * D, o_b[:, None] + o_b[None, :] * D
        x_a = _product(s_a, tl.load(w + o_aa), tl.load(low + o_aa), x_a, PARTS)
        x_a = _product(s_b, tl.load(w + o_ba), tl.load(low + o_ba), x_a, PARTS)
        x_b = _product(s_a, tl.load(w + o_ab), tl.load(low + o_ab), x_b, PARTS)
        x_b = _product(s_b, tl.load(w + o_bb), tl.load(low + o_bb), x_b, PARTS)
    return x_a, x_b


@triton.jit
def _store_rows(
    grad, grad_halo, o_r, o_a, o_b, x_a, x_b, first, length,
    C: tl.constexpr, TAPS: tl.constexpr, HALO: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Store complete rows; those before the chunk belong to the halo."""
    row = first + o_r
    m = (o_r < T - (TAPS - 1)) & (row >= 0) & (row < length)
    x_a, x_b = x_a.to(grad.dtype.element_ty), x_b.to(grad.dtype.element_ty)
    tl.store(grad + o_r * C + o_a[None, :], x_a, mask=m)
    tl.store(grad + o_r * C + o_b[None, :], x_b, mask=m)
    if HALO:
        o_halo = tl.maximum(row + TAPS - 1, 0) * C
        m = (o_r < T - (TAPS - 1)) & (row < 0) & (row > -TAPS)
        tl.store(grad_halo + o_halo + o_a[None, :], x_a, mask=m)
        tl.store(grad_halo + o_halo + o_b[None, :], x_b, mask=m)


@triton.jit
def _values_backward(
    grad_v, positions, grad_now, grad_delayed, grad_halo, i_group, o_r, first, length,
    K: tl.constexpr, D: tl.constexpr, HALO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Both value halves' gradients, D / 2 channels of each per group; pointers at the block."""
    WIDTH: tl.constexpr = K * D // 2
    row = first + o_r
    o_c = i_group * (D // 2) + tl.arange(0, D // 2)[None, :]
    m = (o_r < ROWS) & (row >= 0) & (row < length)
    now = tl.load(grad_v + o_r * (2 * WIDTH) + o_c, mask=m, other=0.0)
    tl.store(grad_now + o_r * WIDTH + o_c, now, mask=m)
    m_next = (row + 1 >= 0) & (row + 1 < length)
    used = tl.load(positions + o_r + 1, mask=m_next, other=0) > 0
    o_next = (o_r + 1) * (2 * WIDTH) + WIDTH + o_c
    late = tl.load(grad_v + o_next, mask=used & (o_r < ROWS), other=0.0)
    tl.store(grad_delayed + o_r * WIDTH + o_c, late, mask=m)
    if HALO:
        # Only the row just before the chunk reaches into it.
        tl.store(grad_halo + o_c + o_r * 0, late, mask=(row == -1) & (o_r < ROWS))


@triton.jit
def cca_backward_inputs(
    qk, halo_qk, positions, cos, sin, weight, constant, temperature, turned,
    grad_q, grad_k, grad_v, grad_qk, grad_now, grad_delayed, grad_halo_qk, grad_halo_v,
    grad_temperature,
    length, chunks, blocks, stride_batch, stride_row,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TAPS: tl.constexpr,
    PARTS: tl.constexpr, HALO: tl.constexpr, HALO_ROWS: tl.constexpr, LEAD: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    tl.assume(stride_row > 0)
    A: tl.constexpr = H + K
    G: tl.constexpr = H // K
    ROWS: tl.constexpr = T - (TAPS - 1)
    i_group, i_block, i_chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The first block starts with the rows before the chunk that it reads.
    first = i_block * ROWS - LEAD
    o_r = tl.arange(0, T)[:, None]
    o_a, o_b = _columns(HALF, D)
    before = (i_chunk % chunks).to(tl.int64) * length + first
    token = i_chunk.to(tl.int64) * length + first
    position = _positions(positions + token, o_r, first, length)
    p_qk = qk + (i_chunk // chunks).to(tl.int64) * stride_batch
    p_qk += (before - (TAPS - 1)) * stride_row
    p_halo, p_grad_halo, p_grad_late = halo_qk, grad_halo_qk, grad_halo_v
    if HALO:
        o_halo = (i_chunk.to(tl.int64) * HALO_ROWS + HALO_ROWS - (TAPS - 1)) * A * D
        p_halo, p_grad_halo = halo_qk + o_halo, grad_halo_qk + o_halo
        p_grad_late = grad_halo_v + i_chunk.to(tl.int64) * (K * D // 2)
    b_cos, b_sin = _angles(cos + token * HALF, sin + token * HALF, o_r, position >= 0, HALF, D)
    a, b = _mixed_key(
        p_qk, p_halo, weight, constant, i_group, o_r, o_a, o_b, position, first, stride_row,
        H, K, D, TAPS, PARTS, HALO,
    )  # fmt: skip
    k_a, k_b, share = _unnormalised_gradient(
        grad_k + (token * K + i_group) * D, o_r * (K * D), o_a, o_b, a, b, b_cos, b_sin, position,
        tl.load(temperature + i_group).to(tl.float32), D,
    )  # fmt: skip
    # Rows before the chunk have no share; rows after ROWS are the next block's.
    own = tl.where(o_r < ROWS, share, 0.0)
    i_out = (i_chunk * blocks + i_block).to(tl.int64) * K + i_group
    tl.store(grad_temperature + i_out, tl.sum(own))
    sum_a = tl.zeros([T, D // 2], tl.float32)
    sum_b = tl.zeros([T, D // 2], tl.float32)
    for i in range(G):
        i_head = i_group * G + i
        a, b = _mixed_query(
            p_qk, p_halo, weight, constant, i_group, i_head, o_r, o_a, o_b, position, first,
            stride_row, H, K, D, TAPS, 1, HALO,
        )  # fmt: skip
        g_a, g_b, _ = _unnormalised_gradient(
            grad_q + (token * H + i_head) * D, o_r * (H * D), o_a, o_b, a, b, b_cos, b_sin,
            position, 1.0, D,
        )  # fmt: skip
        sum_a += g_a
        sum_b += g_b
        x_a, x_b = _transposed(
            g_a, g_b, turned, i_head, o_r, o_a, o_b, position, A, D, TAPS, PARTS, T
        )
        _store_rows(
            grad_qk + token * A * D + i_head * D, p_grad_halo + i_head * D, o_r, o_a, o_b,
            x_a + (0.5 / G) * k_a, x_b + (0.5 / G) * k_b, first, length, A * D, TAPS, HALO, T,
        )  # fmt: skip
    i_head = H + i_group
    x_a, x_b = _transposed(k_a, k_b, turned, i_head, o_r, o_a, o_b, position, A, D, TAPS, PARTS, T)
    _store_rows(
        grad_qk + token * A * D + i_head * D, p_grad_halo + i_head * D, o_r, o_a, o_b,
        x_a + 0.5 * sum_a, x_b + 0.5 * sum_b, first, length, A * D, TAPS, HALO, T,
    )  # fmt: skip
    WIDTH: tl.constexpr = K * D // 2
    _values_backward(
        grad_v + token * 2 * WIDTH, positions + token, grad_now + token * WIDTH,
        grad_delayed + token * WIDTH, p_grad_late, i_group, o_r, first, length, K, D, HALO, ROWS,
    )  # fmt: skip


@triton.jit
def cca_backward_weights(
    qk, halo_qk, positions, cos, sin, weight, constant, temperature, grad_q, grad_k,
    grad_weight, grad_constant,
    length, chunks, blocks, splits, stride_batch, stride_row,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TAPS: tl.constexpr,
    PARTS: tl.constexpr, HALO: tl.constexpr, HALO_ROWS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    tl.assume(stride_row > 0)
    A: tl.constexpr = H + K
    G: tl.constexpr = H // K
    i_head, i_split = tl.program_id(0), tl.program_id(1)
    o_r = tl.arange(0, T)[:, None]
    o_a, o_b = _columns(HALF, D)
    o_k = tl.arange(0, D)[None, :]
    per_chunk = tl.cdiv(length, T)
    s_a, s_b = (), ()
    for _ in tl.static_range(TAPS):
        s_a += (tl.zeros([D // 2, D], tl.float32),)
        s_b += (tl.zeros([D // 2, D], tl.float32),)
    c_a, c_b = tl.zeros([D // 2], tl.float32), tl.zeros([D // 2], tl.float32)
    for i_block in range(i_split, blocks, splits):
        i_chunk = tl.cast(i_block // per_chunk, tl.int64)
        first = (i_block % per_chunk) * T
        before = (i_chunk % chunks) * length + first
        token = i_chunk * length + first
        position = _positions(positions + token, o_r, first, length)
        p_qk = qk + (i_chunk // chunks) * stride_batch + (before - (TAPS - 1)) * stride_row
        p_halo = halo_qk
        if HALO:
            p_halo = halo_qk + (i_chunk * HALO_ROWS + HALO_ROWS - (TAPS - 1)) * A * D
        b_cos, b_sin = _angles(cos + token * HALF, sin + token * HALF, o_r, position >= 0, HALF, D)
        if i_head < H:
            a, b = _mixed_query(
                p_qk, p_halo, weight, constant, i_head // G, i_head, o_r, o_a, o_b, position,
                first, stride_row, H, K, D, TAPS, 1, HALO,
            )  # fmt: skip
            g_a, g_b, _share = _unnormalised_gradient(
                grad_q + (token * H + i_head) * D, o_r * (H * D), o_a, o_b, a, b, b_cos, b_sin,
                position, 1.0, D,
            )  # fmt: skip
        else:
            i_group = i_head - H
            a, b = _mixed_key(
                p_qk, p_halo, weight, constant, i_group, o_r, o_a, o_b, position, first,
                stride_row, H, K, D, TAPS, 1, HALO,
            )  # fmt: skip
            g_a, g_b, _share = _unnormalised_gradient(
                grad_k + (token * K + i_group) * D, o_r * (K * D), o_a, o_b, a, b, b_cos, b_sin,
                position, tl.load(temperature + i_group).to(tl.float32), D,
            )  # fmt: skip
        c_a += tl.sum(g_a, axis=0)
        c_b += tl.sum(g_b, axis=0)
        new_a, new_b = (), ()
        for back in tl.static_range(TAPS):
            x = _rows(
                qk=p_qk + i_head * D, halo=p_halo + i_head * D, o_r=o_r, o_c=o_k,
                m_r=position >= back, first=first, back=back, stride_row=stride_row,
                C=A * D, TAPS=TAPS, HALO=HALO,
            )  # fmt: skip
            new_a += (_outer(g_a, x, s_a[back], PARTS),)
            new_b += (_outer(g_b, x, s_b[back], PARTS),)
        s_a, s_b = new_a, new_b
    # Partial sums: grad_weight [splits, A, TAPS, d, d], grad_constant [splits, A, d].
    i_out = (i_split * A + i_head).to(tl.int64)
    for back in tl.static_range(TAPS):
        p_out = grad_weight + (i_out * TAPS + back) * D * D + o_k
        tl.store(p_out + o_a[:, None] * D, s_a[back])
        tl.store(p_out + o_b[:, None] * D, s_b[back])
    tl.store(grad_constant + i_out * D + o_a, c_a)
    tl.store(grad_constant + i_out * D + o_b, c_b)


@triton.jit
def _outer(g, x, accumulator, PARTS: tl.constexpr):
    """accumulator + g^T x; a bf16 x is exact, g enters in two parts."""
    if PARTS == 1:
        return tl.dot(tl.trans(g), x, accumulator, input_precision="ieee")
    else:
        high = _high(g)
        accumulator = tl.dot(tl.trans(_high(g - high.to(tl.float32))), x, accumulator)
        return tl.dot(tl.trans(high), x, accumulator)
