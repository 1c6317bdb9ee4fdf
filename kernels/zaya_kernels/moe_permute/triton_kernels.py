"""Kernels of the permutation by expert; see `zaya_kernels.moe_permute.triton`.

Legend: T tokens, C classes padded to a power of two, D columns padded to COLUMNS.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _members(choice, num_tokens, CLASSES: tl.constexpr, BT: tl.constexpr):
    """[BT, CLASSES] int32: 1 where a token of this program's block has the class."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    b_choice = tl.load(choice + o_t, mask=o_t < num_tokens, other=CLASSES).to(tl.int32)
    return (b_choice[:, None] == tl.arange(0, CLASSES)[None, :]).to(tl.int32)


@triton.jit
def permute_count(choice, found, num_tokens, CLASSES: tl.constexpr, BT: tl.constexpr):
    """found [blocks, CLASSES]."""
    o = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    tl.store(found + o, tl.sum(_members(choice, num_tokens, CLASSES, BT), axis=0))


@triton.jit
def permute_sum(
    found, starts, counts, num_blocks, num_experts, CLASSES: tl.constexpr, BB: tl.constexpr
):
    """starts [blocks, CLASSES], the first place of each block's tokens; counts [C]."""
    o_b = tl.arange(0, BB)[:, None]
    o_c = tl.arange(0, CLASSES)
    a_total = tl.zeros([CLASSES], tl.int32)
    for first in range(0, num_blocks, BB):
        o = (first + o_b) * CLASSES + o_c[None, :]
        a_total += tl.sum(tl.load(found + o, mask=first + o_b < num_blocks, other=0), axis=0)
    tl.store(counts + o_c, a_total.to(tl.int64), mask=o_c <= num_experts)
    a_start = tl.cumsum(a_total, axis=0) - a_total
    for first in range(0, num_blocks, BB):
        o, m = (first + o_b) * CLASSES + o_c[None, :], first + o_b < num_blocks
        b = tl.load(found + o, mask=m, other=0)
        tl.store(starts + o, a_start[None, :] + tl.cumsum(b, axis=0) - b, mask=m)
        a_start += tl.sum(b, axis=0)


@triton.jit
def permute_place(choice, starts, order, num_tokens, CLASSES: tl.constexpr, BT: tl.constexpr):
    """A token's place: its block's start in its class, and those of the class before it there."""
    b_members = _members(choice, num_tokens, CLASSES, BT)
    b_starts = tl.load(starts + tl.program_id(0) * CLASSES + tl.arange(0, CLASSES))
    b_rank = b_starts[None, :] + tl.cumsum(b_members, axis=0) - 1
    b_place = tl.sum(b_members * b_rank, axis=1)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    tl.store(order + b_place, o_t.to(tl.int64), mask=o_t < num_tokens)


@triton.jit
def permute_gather(
    tokens, rows, order, skipped, num_tokens, D: tl.constexpr, COLUMNS: tl.constexpr
):
    """rows[place] = tokens[order[place]], of tokens with an expert."""
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(order + place)
    o_c = tl.arange(0, COLUMNS)
    if place < num_tokens - tl.load(skipped):
        b = tl.load(tokens + token * D + o_c, mask=o_c < D)
        tl.store(rows + place * D + o_c, b, mask=o_c < D)


@triton.jit
def permute_scatter(
    rows, rest, probability, out, order, skipped, num_tokens,
    D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[order[place]] = rows[place], or rest's row or zero of tokens without an expert; times
    the probability, if there is one."""
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(order + place)
    o_c = tl.arange(0, COLUMNS)
    m = o_c < D
    if place < num_tokens - tl.load(skipped):
        b = tl.load(rows + place * D + o_c, mask=m)
    elif rest is not None:
        b = tl.load(rest + token * D + o_c, mask=m)
    else:
        b = tl.zeros([COLUMNS], rows.dtype.element_ty)
    if probability is not None:
        b = (b.to(tl.float32) * tl.load(probability + token).to(tl.float32)).to(b.dtype)
    tl.store(out + token * D + o_c, b, mask=m)


@triton.jit
def permute_scatter_backward(
    grad, rows, rest, probability, grad_rows, grad_rest, grad_probability,
    order, skipped, num_tokens, D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of rows [R, D], of rest's rows of tokens without an expert and of the probability
    [T]; rows that are not theirs are not written."""
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(order + place)
    o_c = tl.arange(0, COLUMNS)
    m = o_c < D
    b_grad = tl.load(grad + token * D + o_c, mask=m, other=0.0).to(tl.float32)
    b_scaled = b_grad * tl.load(probability + token).to(tl.float32)
    dot = tl.full([], 0.0, tl.float32)
    if place < num_tokens - tl.load(skipped):
        b = tl.load(rows + place * D + o_c, mask=m, other=0.0).to(tl.float32)
        dot = tl.sum(b * b_grad, axis=0)
        tl.store(grad_rows + place * D + o_c, b_scaled.to(grad_rows.dtype.element_ty), mask=m)
    else:
        if rest is not None:
            b = tl.load(rest + token * D + o_c, mask=m, other=0.0).to(tl.float32)
            dot = tl.sum(b * b_grad, axis=0)
        if grad_rest is not None:
            tl.store(grad_rest + token * D + o_c, b_scaled.to(grad_rest.dtype.element_ty), mask=m)
    tl.store(grad_probability + token, dot.to(grad_probability.dtype.element_ty))
