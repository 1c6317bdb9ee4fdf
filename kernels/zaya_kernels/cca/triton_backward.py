"""The CCA backward kernel; what it computes and how: `zaya_kernels.cca.triton`.

One program per head and part of the tokens makes the head's gradients again, hands them to its
input rows and sums its weights' gradients in registers. The means tie a group's heads together, so
a query's program also makes its key's gradient, and a key's program those of its queries.

Legend: n chunks per row, L tokens per chunk, T rows of a block, H query heads, K KV heads,
G = H / K heads of a group, A = H + K, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zaya_kernels.cca.triton_kernels import EPS, own, positions_of, rows_of


@triton.jit
def _angles_back(cos, sin, o_r, o_c, m_r, HALF: tl.constexpr):
    """Cosines and signed sines [T, d] that turn a gradient back: u = g cos + partner(g) sin."""
    j = tl.where(o_c < HALF, o_c, o_c - HALF)
    m = m_r & (o_c < 2 * HALF)
    b_sin = tl.load(sin + o_r * HALF + j, mask=m, other=0.0)
    b_cos = tl.load(cos + o_r * HALF + j, mask=m, other=1.0)
    return b_cos, tl.where(o_c < HALF, b_sin, -b_sin)


@triton.jit
def _partners(o_k, HALF: tl.constexpr):
    """The channel that each channel is rotated with; itself where it is not."""
    partner = tl.where(o_k < HALF, o_k + HALF, tl.where(o_k < 2 * HALF, o_k - HALF, o_k))
    return tl.max_contiguous(tl.multiple_of(partner, 8), 8)


@triton.jit
def _high(x):
    """The upper 16 bits of fp32 as bf16: cheaper than rounding, which is software on gfx942."""
    return ((x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _parts(x, PARTS: tl.constexpr):
    """fp32 as operands of a matrix product: itself, or two bf16 numbers whose sum it nearly is."""
    if PARTS == 1:
        return x, x
    else:
        high = _high(x)
        return high, _high(x - high.to(tl.float32))


@triton.jit
def _recomputed(
    p_qk, p_halo, weight, constant, i_head, i_group, o_r, o_k, position, first, stride_row, parts,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """A head before normalisation [T, d], from so many parts of the weights. A loop and not its
    unrolled steps, whose loads would be made all at once."""
    A: tl.constexpr = H + K
    G: tl.constexpr = H // K
    o_c = o_k[None, :]
    mixed = tl.zeros([o_r.shape[0], D], tl.float32) + tl.load(constant + i_head * D + o_k)[None, :]
    # The mean's other heads: a query's key, a key's queries.
    others = tl.where(i_head < H, 1, G)
    start = tl.where(i_head < H, H + i_group, i_group * G)
    for i in range(others):
        x = own(p_qk, p_halo, start + i, o_r, o_k, position, first, stride_row, A, D, TAPS)
        mixed += x * (0.5 / others)
    for i in range(parts * TAPS):
        back = i % TAPS
        x = rows_of(
            p_qk + i_head * D, p_halo + i_head * D, o_r, o_c, position >= back, first, back,
            stride_row, A * D, TAPS, HALO,
        )  # fmt: skip
        w = weight + ((i // TAPS * A + i_head) * TAPS + back) * D * D
        mixed = tl.dot(x, tl.load(w + o_k[:, None] + o_c * D), mixed, input_precision="ieee")
    return mixed


@triton.jit
def _unnormalised_gradient(grad, o_row, o_k, mixed, b_cos, b_sin, m, temperature,
                           HALF: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Gradient of a mixed head from that of the rotated output; and, per row, the share of the
    temperature's gradient."""
    g = tl.load(grad + o_row + o_k[None, :], mask=m, other=0.0).to(tl.float32)
    o_p = _partners(o_k, HALF)[None, :]
    partner = tl.load(grad + o_row + o_p, mask=m, other=0.0).to(tl.float32)
    u = g * b_cos + partner * b_sin
    norm = tl.sqrt(tl.sum(mixed * mixed, axis=1, keep_dims=True))
    floor = tl.maximum(norm, EPS)
    dot = tl.sum(u * mixed, axis=1, keep_dims=True)
    share = dot * (D**0.5 / floor)
    scale = temperature * (D**0.5 / floor)
    # Below the floor of the norm the scale is a constant.
    pull = tl.where(norm > EPS, dot * scale / (floor * floor), 0.0)
    return u * scale - mixed * pull, share


@triton.jit
def _inner_gradients(
    g, turned, i_head, o_k, D: tl.constexpr, TAPS1: tl.constexpr, PARTS: tl.constexpr
):
    """g [T, d] through the matrix of every delay, fp32. `turned` holds them as [d_in, d_out], so
    that both operands are contiguous along the summed dimension."""
    inner = ()
    for delay in tl.static_range(TAPS1):
        w = turned + (i_head * TAPS1 + delay) * D * D
        w = tl.load(w + o_k[:, None] + o_k[None, :] * D)
        high, low = _parts(g, PARTS)
        x = tl.dot(high, w, input_precision="ieee")
        if PARTS == 2:
            x = tl.dot(low, w, x)
        inner += (x,)
    return inner


@triton.jit
def _moved(x, later, accumulator, PARTS: tl.constexpr):
    """accumulator + later x, where `later` [T, T] holds a one per row that is moved: on the matrix
    pipe, because lanes exchange single numbers slowly."""
    high, low = _parts(x, PARTS)
    accumulator = tl.dot(later.to(high.dtype), high, accumulator, input_precision="ieee")
    if PARTS == 2:
        accumulator = tl.dot(later.to(high.dtype), low, accumulator)
    return accumulator


@triton.jit
def _rows_gradient(
    inner, means, depthwise, o_r, o_k, p_positions, first, length,
    C: tl.constexpr, TAPS0: tl.constexpr, TAPS1: tl.constexpr, PARTS: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Gradient of a head's input rows: each delay's, moved back by it, and `means`. The last rows
    of the block lack what comes from the next one."""
    o_t = tl.arange(0, T)[None, :]
    position = positions_of(p_positions, o_t, first, length)
    x = means
    for back in tl.static_range(TAPS0 + TAPS1 - 1):
        part = tl.zeros_like(means)
        for delay in tl.static_range(TAPS1):
            if back >= delay and back - delay < TAPS0:
                part += inner[delay] * tl.load(depthwise + (back - delay) * C + o_k)[None, :]
        if back == 0:
            x += part
        else:
            x = _moved(part, (o_t == o_r + back) & (position >= back), x, PARTS)
    return x


@triton.jit
def _store_rows(
    grad, grad_halo, o_r, o_c, x, first, length,
    C: tl.constexpr, TAPS: tl.constexpr, HALO: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Store complete rows; those before the chunk belong to the halo."""
    row = first + o_r
    m = (o_r < T - (TAPS - 1)) & (row >= 0) & (row < length)
    x = x.to(grad.dtype.element_ty)
    tl.store(grad + o_r * C + o_c, x, mask=m)
    if HALO:
        o_halo = tl.maximum(row + TAPS - 1, 0) * C
        m = (o_r < T - (TAPS - 1)) & (row < 0) & (row > -TAPS)
        tl.store(grad_halo + o_halo + o_c, x, mask=m)


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
def _outer(g_high, g_low, x, accumulator, PARTS: tl.constexpr):
    """accumulator + g^T x, without the product of the two low parts."""
    high, low = _parts(x, PARTS)
    if PARTS == 2:
        accumulator = tl.dot(tl.trans(g_high), low, accumulator)
        accumulator = tl.dot(tl.trans(g_low), high, accumulator)
    return tl.dot(tl.trans(g_high), high, accumulator, input_precision="ieee")


@triton.jit
def _delayed(
    p_qk, p_halo, o_r, o_c, position, first, stride_row,
    C: tl.constexpr, TAPS: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """A head's rows [T, d] by delay, fp32."""
    rows = ()
    for back in tl.static_range(TAPS):
        m_r = position >= back
        x = rows_of(p_qk, p_halo, o_r, o_c, m_r, first, back, stride_row, C, TAPS, HALO)
        rows += (x.to(tl.float32),)
    return rows


@triton.jit
def _depthwise_sums(
    inner, rows, sums, m_own, TAPS0: tl.constexpr, TAPS1: tl.constexpr,
):  # fmt: skip
    """sums, per tap of the depthwise convolution, and the rows' part of its gradient."""
    new = ()
    for back in tl.static_range(TAPS0):
        x = inner[0] * rows[back]
        for delay in tl.static_range(1, TAPS1):
            x += inner[delay] * rows[back + delay]
        new += (sums[back] + tl.sum(tl.where(m_own, x, 0.0), axis=0),)
    return new


@triton.jit
def _grouped_sums(
    g, rows, sums, depthwise, o_c,
    C: tl.constexpr, TAPS0: tl.constexpr, TAPS1: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The same of the per-head mix, whose input rows are made again."""
    g_high, g_low = _parts(g, PARTS)
    new = ()
    for delay in tl.static_range(TAPS1):
        x = rows[delay] * tl.load(depthwise + o_c)
        for back in tl.static_range(1, TAPS0):
            x += rows[delay + back] * tl.load(depthwise + back * C + o_c)
        new += (_outer(g_high, g_low, x, sums[delay], PARTS),)
    return new


@triton.jit
def cca_backward(
    qk, halo_qk, positions, cos, sin, weight, constant, temperature, depthwise, turned,
    grad_q, grad_k, grad_v, grad_qk, grad_now, grad_delayed, grad_halo_qk, grad_halo_v,
    grad_grouped, grad_depthwise, grad_constant, grad_temperature,
    length, chunks, per_chunk, blocks, key_splits, query_splits, stride_batch, stride_row,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TAPS0: tl.constexpr,
    TAPS1: tl.constexpr, PARTS: tl.constexpr, HALO: tl.constexpr, HALO_ROWS: tl.constexpr,
    LEAD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    tl.assume(stride_row > 0)
    A: tl.constexpr = H + K
    G: tl.constexpr = H // K
    TAPS: tl.constexpr = TAPS0 + TAPS1 - 1
    ROWS: tl.constexpr = T - (TAPS - 1)
    WIDTH: tl.constexpr = K * D // 2
    # Programs of the keys first: they take longer.
    i_program = tl.program_id(0)
    is_key = i_program < K * key_splits
    i_query = i_program - K * key_splits
    i_head = tl.where(is_key, H + i_program % K, i_query % H)
    i_split = tl.where(is_key, i_program // K, i_query // H)
    splits = tl.where(is_key, key_splits, query_splits)
    i_group = tl.where(is_key, i_head - H, i_head // G)
    o_r = tl.arange(0, T)[:, None]
    o_k = tl.arange(0, D)
    o_c = o_k[None, :]
    sum_grouped, sum_depthwise = (), ()
    for _ in tl.static_range(TAPS1):
        sum_grouped += (tl.zeros([D, D], tl.float32),)
    for _ in tl.static_range(TAPS0):
        sum_depthwise += (tl.zeros([D], tl.float32),)
    sum_g = tl.zeros([D], tl.float32)
    sum_share = 0.0
    for i_block in range(i_split, blocks, splits):
        i_chunk = tl.cast(i_block // per_chunk, tl.int64)
        # The first block starts with the rows before the chunk that it reads.
        first = (i_block % per_chunk) * ROWS - LEAD
        before = (i_chunk % chunks) * length + first
        token = i_chunk * length + first
        position = positions_of(positions + token, o_r, first, length)
        p_qk = qk + (i_chunk // chunks) * stride_batch + (before - (TAPS - 1)) * stride_row
        p_halo, p_grad_halo, p_grad_late = halo_qk, grad_halo_qk, grad_halo_v
        if HALO:
            o_halo = (i_chunk * HALO_ROWS + HALO_ROWS - (TAPS - 1)) * A * D
            p_halo, p_grad_halo = halo_qk + o_halo, grad_halo_qk + o_halo
            p_grad_late = grad_halo_v + i_chunk * WIDTH
        b_cos, b_sin = _angles_back(
            cos + token * HALF, sin + token * HALF, o_r, o_c, position >= 0, HALF
        )
        g = tl.zeros([T, D], tl.float32)
        means = tl.zeros([T, D], tl.float32)
        share = tl.zeros([T, 1], tl.float32)
        # The heads that share the input's gradient, this program's own last.
        others = tl.where(is_key, G, 1)
        for i in range(others + 1):
            is_own = i == others
            i_other = tl.where(is_own, i_head, tl.where(is_key, i_group * G + i, H + i_group))
            mixed = _recomputed(
                p_qk, p_halo, weight, constant, i_other, i_group, o_r, o_k, position, first,
                stride_row, tl.where(is_own & is_key, PARTS, 1), H, K, D, TAPS, HALO,
            )  # fmt: skip
            if i_other < H:
                p_grad = grad_q + (token * H + i_other) * D
                row_size, scale = H * D, 1.0
            else:
                p_grad = grad_k + (token * K + i_group) * D
                row_size, scale = K * D, tl.load(temperature + i_group).to(tl.float32)
            g, share = _unnormalised_gradient(
                p_grad, o_r * row_size, o_k, mixed, b_cos, b_sin, position >= 0, scale, HALF, D
            )
            means += g * tl.where(is_own | is_key, 0.5, 0.5 / G)
        if is_key:
            sum_share += tl.sum(tl.where(o_r < ROWS, share, 0.0))
            _values_backward(
                grad_v + token * 2 * WIDTH, positions + token, grad_now + token * WIDTH,
                grad_delayed + token * WIDTH, p_grad_late, i_group, o_r, first, length,
                K, D, HALO, ROWS,
            )  # fmt: skip
        inner = _inner_gradients(g, turned, i_head, o_k, D, TAPS1, PARTS)
        x = _rows_gradient(
            inner, means, depthwise + i_head * D, o_r, o_k, positions + token, first, length,
            A * D, TAPS0, TAPS1, PARTS, T,
        )  # fmt: skip
        _store_rows(
            grad_qk + token * A * D + i_head * D, p_grad_halo + i_head * D, o_r, o_c, x, first,
            length, A * D, TAPS, HALO, T,
        )  # fmt: skip
        rows = _delayed(
            p_qk + i_head * D, p_halo + i_head * D, o_r, o_c, position, first, stride_row,
            A * D, TAPS, HALO,
        )  # fmt: skip
        # Rows from ROWS on are the next block's.
        m_own = o_r < ROWS
        sum_depthwise = _depthwise_sums(inner, rows, sum_depthwise, m_own, TAPS0, TAPS1)
        g = tl.where(m_own, g, 0.0)
        sum_g += tl.sum(g, axis=0)
        sum_grouped = _grouped_sums(
            g, rows, sum_grouped, depthwise + i_head * D, o_c, A * D, TAPS0, TAPS1, PARTS
        )
    # Partial sums of one head, in the order of the programs.
    i_out = i_program.to(tl.int64)
    for delay in tl.static_range(TAPS1):
        p_out = grad_grouped + (i_out * TAPS1 + delay) * D * D
        tl.store(p_out + o_k[:, None] * D + o_c, sum_grouped[delay])
    for back in tl.static_range(TAPS0):
        tl.store(grad_depthwise + (i_out * TAPS0 + back) * D + o_k, sum_depthwise[back])
    tl.store(grad_constant + i_out * D + o_k, sum_g)
    if is_key:
        tl.store(grad_temperature + i_program, sum_share)
