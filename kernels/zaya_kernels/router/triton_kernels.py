"""The router's kernels; what they compute and how: `zaya_kernels.router.triton`.

Rows past the last token are the last token again and are not stored. WIDE products take both
operands in fp32. NORM and GELU are applied to a product's left operand as it is loaded, so neither
normalised nor activated values are ever written.

Legend: T tokens, K summed and N kept columns of a product, R router width, C classes, CP classes in
whole blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

HALF_ROOT = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)
LOG2E = tl.constexpr(1.4426950408889634)
EXPONENT = tl.constexpr(-0.7213475204444817)  # of the normal density, to base 2


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * HALF_ROOT))


@triton.jit
def _slope(x):
    """Derivative of `_gelu`."""
    return 0.5 * (1.0 + tl.erf(x * HALF_ROOT)) + x * DENSITY * tl.exp2(x * x * EXPONENT)


@triton.jit
def router_product(
    a, weight, out, bias, previous, scale, norm, rstd, z,
    tokens, eps,
    K: tl.constexpr, N: tl.constexpr, STEP_K: tl.constexpr, STEP_N: tl.constexpr,
    WIDE: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, DEPTH: tl.constexpr,
    SLOPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [T, N] = a [T, K] @ weight, then: + bias, + previous * scale, * slope of z."""
    i_m = tl.program_id(0) // (N // BN)
    i_n = tl.program_id(0) % (N // BN)
    left = tokens - i_m * BM
    o_m = tl.minimum(tl.arange(0, BM), left - 1)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m = tl.arange(0, BM) < left
    row = tl.cast(i_m * BM, tl.int64)
    p_a = a + row * K
    p_w = weight
    if NORM:
        b_row = tl.load(p_a + (o_m[:, None] * K + tl.arange(0, K)[None, :]))  # [BM, K]
        b_rstd = tl.rsqrt(tl.sum(b_row * b_row, axis=1) / K + eps)
        if i_n == 0:
            tl.store(rstd + row + tl.arange(0, BM), b_rstd, mask=m)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        b_a = tl.load(p_a + (o_m[:, None] * K + o_k[None, :]))  # [BM, BK]
        b_w = tl.load(p_w + (o_k[:, None] * STEP_K + o_n[None, :] * STEP_N))  # [BK, BN]
        if NORM:
            b_a = b_a * b_rstd[:, None] * tl.load(norm + first + o_k).to(tl.float32)[None, :]
        if WIDE:
            acc = tl.dot(b_a.to(tl.float32), b_w.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(b_a, b_w, acc, input_precision="ieee")
        p_a += BK
        p_w += BK * STEP_K
    if BIAS:
        acc += tl.load(bias + o_n).to(tl.float32)[None, :]
    o = o_m[:, None] * N + o_n[None, :]
    if DEPTH:
        acc += tl.load(previous + row * N + o) * tl.load(scale + o_n).to(tl.float32)[None, :]
    if SLOPE:
        acc = acc * _slope(tl.load(z + row * N + o))
    tl.store(out + row * N + o, acc.to(out.dtype.element_ty), mask=m[:, None])


@triton.jit
def router_choice(
    z1, fc2, fc2_bias, last, balancing, valid, z2, probabilities, choice, probability, counts,
    tokens,
    R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, GIVEN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0)
    left = tokens - i_m * BM
    o_m = tl.minimum(tl.arange(0, BM), left - 1)
    o_r = tl.arange(0, R)
    o_k = tl.arange(0, BK)
    o_c = tl.arange(0, CP)
    m = tl.arange(0, BM) < left
    row = tl.cast(i_m * BM, tl.int64)
    p_a = z1 + row * R
    p_w = fc2
    acc = tl.zeros([BM, R], tl.float32)
    for _ in range(0, R, BK):
        b_a = _gelu(tl.load(p_a + (o_m[:, None] * R + o_k[None, :])))  # [BM, BK]
        b_w = tl.load(p_w + (o_k[:, None] + o_r[None, :] * R)).to(tl.float32)  # [BK, R]
        acc = tl.dot(b_a, b_w, acc, input_precision="ieee")
        p_a += BK
        p_w += BK
    acc += tl.load(fc2_bias + o_r).to(tl.float32)[None, :]
    tl.store(z2 + row * R + (o_m[:, None] * R + o_r[None, :]), acc, mask=m[:, None])
    b_last = tl.load(last + (o_r[:, None] + tl.minimum(o_c, C - 1)[None, :] * R))  # [R, CP]
    s = tl.dot(_gelu(acc), b_last.to(tl.float32), input_precision="ieee")  # [BM, CP]
    s = tl.where((o_c < C)[None, :], s, float("-inf"))
    p = tl.exp2((s - tl.max(s, axis=1)[:, None]) * LOG2E)
    p = p / tl.sum(p, axis=1)[:, None]
    o = o_m[:, None] * C + o_c[None, :]
    tl.store(probabilities + row * C + o, p, mask=m[:, None] & (o_c < C)[None, :])
    if GIVEN:
        b_choice = tl.load(choice + row + o_m).to(tl.int32)
    else:
        b_bias = tl.load(balancing + o_c, mask=o_c < C, other=float("-inf")).to(tl.float32)
        # Of a row of NaN argmax takes any column on a GPU, also one beyond the classes.
        b_choice = tl.minimum(tl.argmax(p + b_bias[None, :], axis=1), C - 1)
        tl.store(choice + row + tl.arange(0, BM), b_choice.to(tl.int64), mask=m)
    chosen = o_c[None, :] == b_choice[:, None]
    tl.store(probability + row + tl.arange(0, BM), tl.sum(tl.where(chosen, p, 0.0), axis=1), mask=m)
    if not GIVEN:
        counted = m & (tl.load(valid + row + o_m) != 0)
        b_count = tl.sum(tl.where(chosen & counted[:, None], 1, 0), axis=0)
        tl.store(counts + tl.cast(i_m, tl.int64) * CP + o_c, b_count)


@triton.jit
def router_grad_choice(
    probabilities, choice, grad, last, z2, grad_scores, grad_z2,
    tokens,
    R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0) // (R // BN)
    i_n = tl.program_id(0) % (R // BN)
    left = tokens - i_m * BM
    o_m = tl.minimum(tl.arange(0, BM), left - 1)
    o_n = i_n * BN + tl.arange(0, BN)
    o_c = tl.arange(0, CP)
    m = tl.arange(0, BM) < left
    row = tl.cast(i_m * BM, tl.int64)
    m_c = (o_c < C)[None, :]
    p = tl.load(probabilities + row * C + (o_m[:, None] * C + o_c[None, :]), mask=m_c, other=0.0)
    chosen = o_c[None, :] == tl.load(choice + row + o_m).to(tl.int32)[:, None]
    own = tl.sum(tl.where(chosen, p, 0.0), axis=1) * tl.load(grad + row + o_m)
    b_s = own[:, None] * (tl.where(chosen, 1.0, 0.0) - p)  # [BM, CP]
    if i_n == 0:
        o = o_m[:, None] * CP + o_c[None, :]
        tl.store(grad_scores + row * CP + o, b_s, mask=m[:, None])
    b_last = tl.load(last + (tl.minimum(o_c, C - 1)[:, None] * R + o_n[None, :]))  # [CP, BN]
    acc = tl.dot(b_s, b_last.to(tl.float32), input_precision="ieee")
    o = o_m[:, None] * R + o_n[None, :]
    acc = acc * _slope(tl.load(z2 + row * R + o))
    tl.store(grad_z2 + row * R + o, acc, mask=m[:, None])


@triton.jit
def router_grad_state(
    grad_z1, fc1, state, rstd, norm, grad_later, previous, scale,
    grad_state, grad_previous, sums,
    tokens, blocks,
    R: tl.constexpr, LATER: tl.constexpr, DEPTH: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0)
    left = tokens - i_m * BM
    o_m = tl.minimum(tl.arange(0, BM), left - 1)
    o_r = tl.arange(0, R)
    o_k = tl.arange(0, BK)
    m = (tl.arange(0, BM) < left)[:, None]
    row = tl.cast(i_m * BM, tl.int64)
    p_a = grad_z1 + row * R
    p_w = fc1
    acc = tl.zeros([BM, R], tl.float32)
    for _ in range(0, R, BK):
        b_a = tl.load(p_a + (o_m[:, None] * R + o_k[None, :]))  # [BM, BK]
        b_w = tl.load(p_w + (o_k[:, None] * R + o_r[None, :])).to(tl.float32)  # [BK, R]
        acc = tl.dot(b_a, b_w, acc, input_precision="ieee")
        p_a += BK
        p_w += BK * R
    o = o_m[:, None] * R + o_r[None, :]
    b_rstd = tl.load(rstd + row + o_m)[:, None]
    b_n = tl.load(state + row * R + o) * b_rstd  # [BM, R]
    # sums [3, blocks, R]: norm, bias of the down-projection, depth scale.
    p_sums = sums + tl.cast(i_m, tl.int64) * R + o_r
    tl.store(p_sums, tl.sum(tl.where(m, acc * b_n, 0.0), axis=0))
    acc = acc * tl.load(norm + o_r).to(tl.float32)[None, :]
    acc = (acc - b_n * (tl.sum(acc * b_n, axis=1) / R)[:, None]) * b_rstd
    if LATER:
        acc += tl.load(grad_later + row * R + o)
    tl.store(grad_state + row * R + o, acc.to(grad_state.dtype.element_ty), mask=m)
    step = tl.cast(blocks, tl.int64) * R
    tl.store(p_sums + step, tl.sum(tl.where(m, acc, 0.0), axis=0))
    if DEPTH:
        b_previous = tl.load(previous + row * R + o)
        tl.store(p_sums + 2 * step, tl.sum(tl.where(m, acc * b_previous, 0.0), axis=0))
        b_scale = tl.load(scale + o_r).to(tl.float32)[None, :]
        tl.store(grad_previous + row * R + o, acc * b_scale, mask=m)


@triton.jit
def router_grad_weight(
    grad, a, norm, rstd, partial, partial_bias,
    tokens, splits, each,
    M: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr,
    GELU: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """partial [S, M, N]: grad [T, M].T @ a [T, N] over one stretch of tokens each."""
    tiles = M // BM * (N // BN)
    i_split = tl.program_id(0) // tiles
    i_m = tl.program_id(0) % tiles // (N // BN)
    i_n = tl.program_id(0) % (N // BN)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_t = tl.arange(0, BT)
    first = i_split * each
    last = tl.minimum(first + each, tokens)
    acc = tl.zeros([BM, BN], tl.float32)
    a_bias = tl.zeros([BM], tl.float32)
    if NORM:
        b_norm = tl.load(norm + o_n).to(tl.float32)[None, :]
    for at in range(first, last, BT):
        row = tl.cast(at, tl.int64)
        o_row = tl.minimum(o_t, last - at - 1)
        m = (o_t < last - at)[None, :]
        b_g = tl.load(grad + row * M + (o_m[:, None] + o_row[None, :] * M), mask=m, other=0.0)
        b_a = tl.load(a + row * N + (o_row[:, None] * N + o_n[None, :]))  # [BT, BN]
        if NORM:
            b_a = b_a * tl.load(rstd + row + o_row)[:, None] * b_norm
        if GELU:
            b_a = _gelu(b_a)
        if BIAS:
            a_bias += tl.sum(b_g.to(tl.float32), axis=1)
        if WIDE:
            acc = tl.dot(b_g.to(tl.float32), b_a.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(b_g, b_a, acc, input_precision="ieee")
    p_out = partial + tl.cast(i_split, tl.int64) * (M * N)
    tl.store(p_out + (o_m[:, None] * N + o_n[None, :]), acc)
    if BIAS:  # noqa: SIM102 (a constant, then a value)
        if i_n == 0:
            tl.store(partial_bias + i_split * M + o_m, a_bias)
