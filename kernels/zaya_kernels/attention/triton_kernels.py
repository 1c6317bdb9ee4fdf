"""The attention kernels; what they compute and how: `zaya_kernels.attention.triton`.

Every loop over blocks is two: blocks that all queries see whole, and the blocks on the diagonal
(or at a segment's end) that need a mask. Rows past a tile's end are the last row again, and are
not stored; only whole loads, no masks. A block that is an operand of two products in two orders is
loaded twice: gfx942 cannot transpose while it reads LDS.

Legend: BM queries of a block, BN keys of a block, D head dim, GROUP query heads per KV head.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rounded(x, like, CHEAP: tl.constexpr):
    """fp32 to the type of `like`, to nearest. CHEAP: gfx942 has no bf16 conversion; ties away from
    zero take three instructions fewer than ties to even. Infinities and the NaNs that come of bf16
    numbers stay what they are."""
    if CHEAP:
        bits = (x.to(tl.uint32, bitcast=True) + 0x8000) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(like.dtype)


@triton.jit
def _attended(
    q, k, v, a_out, a_max, a_sum, hidden, scale, MASKED: tl.constexpr, CHEAP: tl.constexpr
):
    """One block of keys k [D, BN] and values v [BN, D] added to a_out [BM, D]."""
    s = tl.dot(q, k, input_precision="ieee")  # [BM, BN]
    if MASKED:
        s = tl.where(hidden, float("-inf"), s)
    b_max = tl.maximum(a_max, tl.max(s, axis=1))
    p = tl.exp2(s * scale - (b_max * scale)[:, None])
    shrink = tl.exp2((a_max - b_max) * scale)
    a_sum = a_sum * shrink + tl.sum(p, axis=1)
    a_out = a_out * shrink[:, None]
    a_out = tl.dot(_rounded(p, v, CHEAP), v, a_out, input_precision="ieee")
    return a_out, b_max, a_sum


@triton.jit
def attention_forward(
    q, k, v, out, lse, tiles,
    num_places, stride_q, stride_k, stride_v, head_q, head_k, head_v, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    CHEAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0)
    i_tile = tl.program_id(1) // (TILE // BM)
    within = tl.program_id(1) % (TILE // BM) * BM
    left = tl.load(tiles + i_tile * 5 + 1) - within
    if left <= 0:
        return
    token = tl.load(tiles + i_tile * 5) + within
    position = tl.load(tiles + i_tile * 5 + 3) + within
    key = tl.cast(tl.load(tiles + i_tile * 5 + 2), tl.int64)
    place = tl.cast(i_head, tl.int64) * num_places + tl.load(tiles + i_tile * 5 + 4) + within
    o_d = tl.arange(0, D)
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    p_q = q + tl.cast(token, tl.int64) * stride_q + i_head * head_q
    b_q = tl.load(p_q + (tl.minimum(o_m, left - 1) * stride_q)[:, None] + o_d[None, :])  # [BM, D]
    p_k = k + key * stride_k + i_head // GROUP * head_k
    p_v = v + key * stride_v + i_head // GROUP * head_v
    a_out = tl.zeros([BM, D], tl.float32)
    a_max = tl.full([BM], float("-inf"), tl.float32)
    a_sum = tl.zeros([BM], tl.float32)
    whole = (position + 1) // BN * BN  # keys that all queries of the block see, in blocks
    last = position + tl.minimum(left, BM) - 1
    for _ in range(0, whole, BN):
        b_k = tl.load(p_k + (o_d[:, None] + (o_n * stride_k)[None, :]))  # [D, BN]
        b_v = tl.load(p_v + ((o_n * stride_v)[:, None] + o_d[None, :]))  # [BN, D]
        a_out, a_max, a_sum = _attended(
            b_q, b_k, b_v, a_out, a_max, a_sum, None, scale, False, CHEAP
        )
        p_k += BN * stride_k
        p_v += BN * stride_v
    for first in range(whole, last + 1, BN):
        o_k = tl.minimum(o_n, last - first)
        b_k = tl.load(p_k + (o_d[:, None] + (o_k * stride_k)[None, :]))
        b_v = tl.load(p_v + ((o_k * stride_v)[:, None] + o_d[None, :]))
        hidden = (first + o_n)[None, :] > (position + o_m)[:, None]
        a_out, a_max, a_sum = _attended(
            b_q, b_k, b_v, a_out, a_max, a_sum, hidden, scale, True, CHEAP
        )
        p_k += BN * stride_k
        p_v += BN * stride_v
    a_out = a_out / a_sum[:, None]
    p_out = out + (tl.cast(token, tl.int64) * H + i_head) * D
    m_m = o_m < left
    tl.store(
        p_out + (o_m[:, None] * (H * D) + o_d[None, :]), a_out.to(b_q.dtype), mask=m_m[:, None]
    )
    tl.store(lse + tl.multiple_of(place, BM) + o_m, a_max * scale + tl.log2(a_sum))


@triton.jit
def _pulled(
    q, grad, k, v, k_rows, a_grad, b_lse, b_delta, hidden, scale,
    MASKED: tl.constexpr, CHEAP: tl.constexpr,
):  # fmt: skip
    """Share of one block of keys, k and v [D, BN] and k_rows [BN, D], in the gradient [BM, D] of
    the queries."""
    s = tl.dot(q, k, input_precision="ieee")
    p = tl.exp2(s * scale - b_lse[:, None])  # [BM, BN]
    if MASKED:
        p = tl.where(hidden, 0.0, p)
    pull = p * (tl.dot(grad, v, input_precision="ieee") - b_delta[:, None])
    return tl.dot(_rounded(pull, k, CHEAP), k_rows, a_grad, input_precision="ieee")


@triton.jit
def attention_backward_queries(
    q, k, v, out, lse, tiles, grad, delta, grad_q,
    num_places, stride_q, stride_k, stride_v, head_q, head_k, head_v, scale, scale_grad,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    CHEAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0)
    i_tile = tl.program_id(1) // (TILE // BM)
    within = tl.program_id(1) % (TILE // BM) * BM
    left = tl.load(tiles + i_tile * 5 + 1) - within
    if left <= 0:
        return
    token = tl.load(tiles + i_tile * 5) + within
    position = tl.load(tiles + i_tile * 5 + 3) + within
    key = tl.cast(tl.load(tiles + i_tile * 5 + 2), tl.int64)
    place = tl.cast(i_head, tl.int64) * num_places + tl.load(tiles + i_tile * 5 + 4) + within
    o_d = tl.arange(0, D)
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_q = tl.minimum(o_m, left - 1)
    m_m = o_m < left
    p_q = q + tl.cast(token, tl.int64) * stride_q + i_head * head_q
    b_q = tl.load(p_q + ((o_q * stride_q)[:, None] + o_d[None, :]))
    row = (tl.cast(token, tl.int64) * H + i_head) * D
    o_row = o_q[:, None] * (H * D) + o_d[None, :]
    b_grad = tl.load(grad + row + o_row)
    b_out = tl.load(out + row + o_row)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), axis=1)
    place = tl.multiple_of(place, BM)
    tl.store(delta + place + o_m, b_delta)
    b_lse = tl.load(lse + place + o_m)
    p_k = k + key * stride_k + i_head // GROUP * head_k
    p_v = v + key * stride_v + i_head // GROUP * head_v
    a_grad = tl.zeros([BM, D], tl.float32)
    whole = (position + 1) // BN * BN
    last = position + tl.minimum(left, BM) - 1
    for _ in range(0, whole, BN):
        b_k = tl.load(p_k + (o_d[:, None] + (o_n * stride_k)[None, :]))
        b_v = tl.load(p_v + (o_d[:, None] + (o_n * stride_v)[None, :]))
        b_rows = tl.load(p_k + ((o_n * stride_k)[:, None] + o_d[None, :]))
        a_grad = _pulled(
            b_q, b_grad, b_k, b_v, b_rows, a_grad, b_lse, b_delta, None, scale, False, CHEAP
        )
        p_k += BN * stride_k
        p_v += BN * stride_v
    for first in range(whole, last + 1, BN):
        o_k = tl.minimum(o_n, last - first)
        b_k = tl.load(p_k + (o_d[:, None] + (o_k * stride_k)[None, :]))
        b_v = tl.load(p_v + (o_d[:, None] + (o_k * stride_v)[None, :]))
        b_rows = tl.load(p_k + ((o_k * stride_k)[:, None] + o_d[None, :]))
        hidden = (first + o_n)[None, :] > (position + o_m)[:, None]
        a_grad = _pulled(
            b_q, b_grad, b_k, b_v, b_rows, a_grad, b_lse, b_delta, hidden, scale, True, CHEAP
        )
        p_k += BN * stride_k
        p_v += BN * stride_v
    o_row = o_m[:, None] * (H * D) + o_d[None, :]
    tl.store(grad_q + row + o_row, (a_grad * scale_grad).to(b_q.dtype), mask=m_m[:, None])


@triton.jit
def _pushed(
    k, v, p_q, p_grad, b_lse, b_delta, o_q, o_d, stride_q, stride_grad,
    a_k, a_v, hidden, scale, MASKED: tl.constexpr, CHEAP: tl.constexpr,
):  # fmt: skip
    """One block of queries' share in the gradients [BN, D] of keys k and values v [BN, D]."""
    b_q = tl.load(p_q + (o_d[:, None] + (o_q * stride_q)[None, :]))  # [D, BM]
    b_grad = tl.load(p_grad + (o_d[:, None] + (o_q * stride_grad)[None, :]))
    s = tl.dot(k, b_q, input_precision="ieee")
    pull = tl.dot(v, b_grad, input_precision="ieee") - b_delta[None, :]
    p = tl.exp2(s * scale - b_lse[None, :])  # [BN, BM]
    if MASKED:
        p = tl.where(hidden, 0.0, p)
    b_rows = tl.load(p_grad + ((o_q * stride_grad)[:, None] + o_d[None, :]))  # [BM, D]
    a_v = tl.dot(_rounded(p, k, CHEAP), b_rows, a_v, input_precision="ieee")
    b_rows = tl.load(p_q + ((o_q * stride_q)[:, None] + o_d[None, :]))
    a_k = tl.dot(_rounded(p * pull, k, CHEAP), b_rows, a_k, input_precision="ieee")
    return a_k, a_v


@triton.jit
def attention_backward_keys(
    q, k, v, lse, tiles, segments, grad, delta, grad_k, grad_v,
    num_places, stride_q, stride_k, stride_v, head_q, head_k, head_v, scale, scale_grad,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    CHEAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0)
    i_tile = tl.program_id(1) // (TILE // BN)
    within = tl.program_id(1) % (TILE // BN) * BN
    left = tl.load(tiles + i_tile * 5 + 1) - within
    if left <= 0:
        return
    token = tl.cast(tl.load(tiles + i_tile * 5) + within, tl.int64)
    position = tl.load(tiles + i_tile * 5 + 2) + within
    i_segment = tl.load(tiles + i_tile * 5 + 3)
    num_segments = tl.load(tiles + i_tile * 5 + 4)
    o_d = tl.arange(0, D)
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.minimum(o_n, left - 1)
    p_k = k + token * stride_k + i_head * head_k
    p_v = v + token * stride_v + i_head * head_v
    b_k = tl.load(p_k + ((o_k * stride_k)[:, None] + o_d[None, :]))  # [BN, D]
    b_v = tl.load(p_v + ((o_k * stride_v)[:, None] + o_d[None, :]))
    a_k = tl.zeros([BN, D], tl.float32)
    a_v = tl.zeros([BN, D], tl.float32)
    for i in range(num_segments * GROUP):
        i_query = i_head * GROUP + i % GROUP
        p_segment = segments + (i_segment + i // GROUP) * 4
        start = tl.load(p_segment)
        count = tl.load(p_segment + 1)
        lead = tl.load(p_segment + 2)
        place = tl.cast(i_query, tl.int64) * num_places + tl.load(p_segment + 3)
        # From the block of the first query that sees a key of this one; from `whole` on, all keys
        # are seen.
        sees = tl.maximum(position - lead, 0)
        begin = tl.where(sees < count, sees // BM * BM, count)
        whole = tl.minimum(tl.maximum(position + BN - 1 - lead, begin), count)
        careful = tl.cdiv(whole - begin, BM)
        whole = begin + careful * BM
        rest = tl.maximum(count - whole, 0) // BM * BM
        if whole + rest < count:
            careful += 1
        for j in range(careful):
            first = begin + j * BM
            # Behind the blocks on the diagonal, the one at the segment's end.
            first += tl.where(first >= whole, rest, 0)
            o_q = tl.minimum(o_m, count - 1 - first)
            o_stats = tl.multiple_of(place + first, BM)
            hidden = (position + o_n)[:, None] > (lead + first + o_m)[None, :]
            hidden |= (first + o_m >= count)[None, :]
            row = tl.cast(start + first, tl.int64)
            a_k, a_v = _pushed(
                b_k, b_v, q + row * stride_q + i_query * head_q, grad + (row * H + i_query) * D,
                tl.load(lse + o_stats + o_m), tl.load(delta + o_stats + o_m),
                o_q, o_d, stride_q, H * D,
                a_k, a_v, hidden, scale, True, CHEAP,
            )  # fmt: skip
        row = tl.cast(start + whole, tl.int64)
        p_q = q + row * stride_q + i_query * head_q
        p_grad = grad + (row * H + i_query) * D
        p_lse = lse + tl.multiple_of(place + whole, BM)
        p_delta = delta + tl.multiple_of(place + whole, BM)
        for _ in range(0, rest, BM):
            a_k, a_v = _pushed(
                b_k, b_v, p_q, p_grad, tl.load(p_lse + o_m), tl.load(p_delta + o_m), o_m, o_d,
                stride_q, H * D, a_k, a_v, None, scale, False, CHEAP,
            )  # fmt: skip
            p_q += BM * stride_q
            p_grad += BM * H * D
            p_lse += BM
            p_delta += BM
    row = (token * (H // GROUP) + i_head) * D
    o_row = o_n[:, None] * (H // GROUP * D) + o_d[None, :]
    m_n = (o_n < left)[:, None]
    tl.store(grad_k + row + o_row, (a_k * scale_grad).to(b_k.dtype), mask=m_n)
    tl.store(grad_v + row + o_row, a_v.to(b_k.dtype), mask=m_n)
