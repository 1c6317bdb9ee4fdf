"""The kernels of the loss; what they compute and how: `zaya_kernels.linear_cross_entropy.triton`.

A chunk's rows, padded to whole blocks, have label -1 where they are padding. Of a last block the
columns past the vocabulary take the last class's weight and probability 0; those past the blocks
of scores (a weight's block may be wider) are never written and reach no row that is stored.

Legend: R rows of a chunk, V classes, W elements from row to row of the scores, D hidden, BM rows
and BN columns of a block of a product, BK steps of its sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zaya_kernels.triton_kernels import on_chiplets

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def loss_scores(
    hidden, weight, labels, scores, maxima, sums, chosen,
    rows, vocab, width, tiles,
    D: tl.constexpr, XCDS: tl.constexpr, GRAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = on_chiplets(tl.program_id(0), rows // BM * tiles, XCDS)
    i_m = i % (rows // BM)
    i_n = i // (rows // BM)
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.minimum(o_n, vocab - 1 - i_n * BN)
    p_h = hidden + tl.cast(i_m * BM, tl.int64) * D
    p_w = weight + tl.cast(i_n * BN, tl.int64) * D
    a_s = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, D, BK):
        b_h = tl.load(p_h + (o_m[:, None] * D + o_k[None, :]))  # [BM, BK]
        b_w = tl.load(p_w + (o_k[:, None] + (o_v * D)[None, :]))  # [BK, BN]
        a_s = tl.dot(b_h, b_w, a_s, input_precision="ieee")
        p_h += BK
        p_w += BK
    a_s = tl.where((i_n * BN + o_n < vocab)[None, :], a_s, float("-inf"))
    b_max = tl.max(a_s, axis=1)  # [BM]
    p = tl.exp2((a_s - b_max[:, None]) * LOG2E)
    place = tl.cast(i_n, tl.int64) * rows + i_m * BM
    tl.store(maxima + place + o_m, b_max)
    tl.store(sums + place + o_m, tl.sum(p, axis=1))
    b_label = tl.load(labels + i_m * BM + o_m) - i_n * BN
    found = tl.sum(tl.where(o_n[None, :] == b_label[:, None], a_s, 0.0), axis=1)
    tl.store(chosen + i_m * BM + o_m, found, mask=(b_label >= 0) & (b_label < BN))
    if GRAD:
        p_s = scores + (tl.cast(i_m * BM, tl.int64) * width + i_n * BN)
        tl.store(p_s + (o_m[:, None] * width + o_n[None, :]), p.to(scores.dtype.element_ty))


@triton.jit
def loss_gradient(
    scores, gradient, maxima, sums, chosen, labels, loss,
    rows, width, tiles, z_loss,
    GRAD: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    label = tl.load(labels + row)
    o_t = tl.arange(0, TILES)
    m_t = o_t < tiles
    b_max = tl.load(maxima + (o_t * rows + row), mask=m_t, other=float("-inf"))
    b_sum = tl.load(sums + (o_t * rows + row), mask=m_t, other=0.0)
    top = tl.max(b_max, axis=0)
    lse = top + tl.log(tl.sum(tl.exp2((b_max - top) * LOG2E) * b_sum, axis=0))
    own = tl.load(chosen + row, mask=label >= 0, other=0.0)
    tl.store(loss + row, tl.where(label >= 0, lse - own + z_loss * lse * lse, 0.0))
    if GRAD:
        factor = tl.where(label >= 0, 1.0 + 2.0 * z_loss * lse, 0.0)
        o_b = tl.arange(0, BT)
        o_n = tl.arange(0, BN)
        o = o_b[:, None] * BN + o_n[None, :]
        base = tl.cast(row, tl.int64) * width
        for first in range(0, tiles, BT):
            m_b = first + o_b < tiles
            b_m = tl.load(maxima + ((first + o_b) * rows + row), mask=m_b, other=float("-inf"))
            b_p = tl.load(scores + base + first * BN + o, mask=m_b[:, None], other=0.0)
            b_g = b_p.to(tl.float32) * (tl.exp2((b_m - lse) * LOG2E) * factor)[:, None]
            b_g -= tl.where(first * BN + o == label, 1.0, 0.0)
            tl.store(
                gradient + base + first * BN + o,
                b_g.to(gradient.dtype.element_ty),
                mask=m_b[:, None],
            )


@triton.jit
def loss_grad_hidden(
    gradient, weight, partial,
    rows, vocab, width, splits, each,
    D: tl.constexpr, XCDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles = rows // BM * (D // BN)
    i = on_chiplets(tl.program_id(0), tiles * splits, XCDS)
    i_split = i // tiles
    i_m = i % tiles // (D // BN)
    i_d = i % (D // BN)
    first = i_split * each
    last = tl.minimum(first + each, vocab)
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    p_g = gradient + (tl.cast(i_m * BM, tl.int64) * width + first)
    p_w = weight + (tl.cast(first, tl.int64) * D + i_d * BN)
    a_h = tl.zeros([BM, BN], tl.float32)
    whole = tl.maximum(last - first, 0) // BK * BK
    for _ in range(0, whole, BK):
        b_g = tl.load(p_g + (o_m[:, None] * width + o_k[None, :]))  # [BM, BK]
        b_w = tl.load(p_w + (o_k[:, None] * D + o_d[None, :]))  # [BK, BN]
        a_h = tl.dot(b_g, b_w, a_h, input_precision="ieee")
        p_g += BK
        p_w += BK * D
    if first + whole < last:
        b_g = tl.load(p_g + (o_m[:, None] * width + o_k[None, :]))
        o_v = tl.minimum(o_k, last - first - whole - 1)
        b_w = tl.load(p_w + (o_v[:, None] * D + o_d[None, :]))
        a_h = tl.dot(b_g, b_w, a_h, input_precision="ieee")
    p_out = partial + ((tl.cast(i_split, tl.int64) * rows + i_m * BM) * D + i_d * BN)
    tl.store(p_out + (o_m[:, None] * D + o_d[None, :]), a_h)


@triton.jit
def loss_grad_weight(
    gradient, hidden, grad_weight, low,
    rows, vocab, width,
    D: tl.constexpr, XCDS: tl.constexpr, FIRST: tl.constexpr, NARROW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = on_chiplets(tl.program_id(0), tl.cdiv(vocab, BM) * (D // BN), XCDS)
    i_m = i // (D // BN)
    i_d = i % (D // BN)
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    p_g = gradient + i_m * BM
    p_h = hidden + i_d * BN
    base = tl.cast(i_m * BM, tl.int64) * D + i_d * BN
    o = o_m[:, None] * D + o_d[None, :]
    m = (i_m * BM + o_m < vocab)[:, None]
    # The sum so far comes first: at the end there would be no registers left for it.
    if FIRST:
        a_w = tl.zeros([BM, BN], tl.float32)
    elif NARROW:
        b_low = tl.load(low + base + o, mask=m, other=0)
        a_w = _joined(tl.load(grad_weight + base + o, mask=m, other=0), b_low)
    else:
        a_w = tl.load(grad_weight + base + o, mask=m, other=0.0)
    for _ in range(0, rows, BK):
        b_g = tl.load(p_g + (o_m[:, None] + (o_k * width)[None, :]))  # [BM, BK]
        b_h = tl.load(p_h + (o_k[:, None] * D + o_d[None, :]))  # [BK, BN]
        a_w = tl.dot(b_g, b_h, a_w, input_precision="ieee")
        p_g += BK * width
        p_h += BK * D
    if NARROW:
        # Not a NaN: NVIDIA's is 0x7FFFFFFF, which rounding would turn into -0.
        bits = a_w.to(tl.uint32, bitcast=True) + tl.where(a_w == a_w, 0x80, 0)
        tl.store(grad_weight + base + o, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), m)
        tl.store(low + base + o, ((bits >> 8) & 0xFF).to(tl.uint8), m)
    else:
        tl.store(grad_weight + base + o, a_w, m)


@triton.jit
def _joined(high, low):
    """The upper 16 and the next 8 bits of a number as fp32."""
    bits = (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | (low.to(tl.uint32) << 8)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def loss_finish(high, low, out, factor, size, BLOCK: tl.constexpr):
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    m = o < size - first
    x = _joined(
        tl.load(high + first + o, mask=m, other=0), tl.load(low + first + o, mask=m, other=0)
    )
    tl.store(out + first + o, (x * tl.load(factor)).to(out.dtype.element_ty), mask=m)
