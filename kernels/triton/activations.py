"""What the matrix kernels read instead of x: activations gathered by ``order``, times the column scale, in slot order.

For few vectors they are int16 with a scale a block of 32 columns (the error is below that of float16: half a step of
the largest of 32); for more, float16 with a scale a row of x, which keeps every magnitude of x in range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import column_of_slot

SMALLEST_TOP = tl.constexpr(1e-34)
"""Scales are made for no smaller magnitude: the inverse of one that bfloat16 holds could be infinite in float32."""


@triton.jit
def _scaled(x_ptr, order_ptr, scale_ptr, m, p, valid, K, HAS_ORDER: tl.constexpr):
    """``scale[p] * x[m, order[p]]`` in fp32, 0 for padding; ``m`` is int64, as x may have 2**31 elements and more."""
    feature = tl.load(order_ptr + p, mask=valid, other=0).to(tl.int32) if HAS_ORDER else p
    scale = tl.load(scale_ptr + p, mask=valid, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + m * K + feature, mask=valid & (feature < K), other=0.0).to(tl.float32)
    return x * scale


@triton.jit(do_not_specialize=["M", "blocks4", "blocks3"])
def claq_quantize_activations(
    x_ptr,
    order_ptr,
    scale_ptr,
    xq_ptr,
    xs_ptr,
    xf_ptr,
    M,
    K,
    P,
    blocks4,
    blocks3,
    HAS_ORDER: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """int16 activations for :func:`.gemv.claq_gemv`. Grid ``(ceil(P / 32 / BLOCKS), M)``.

    Args:
        x_ptr: ``[M, K]`` of any floating dtype.
        order_ptr: uint16 or int32 ``[P]``; not read unless HAS_ORDER.
        scale_ptr: fp16 ``[P]``.
        xq_ptr: int16 ``[M, P]``, or ``[2 * M, P]`` with RESIDUAL, in slot order.
        xs_ptr: fp32 ``[M, P / 32]``, or ``[2 * M, P / 32]``.
        xf_ptr: fp32 ``[P, M]`` in column order, written for the outliers if HAS_OUTLIERS.
        RESIDUAL: write two rows a vector, the second the rounding error of the first, for float32 results.
    """
    m = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    slot = tl.arange(0, 32)
    three = (block >= blocks4) & (block < blocks4 + blocks3)
    column = column_of_slot(slot[None, :], three[:, None])
    inside = block * 32 < P
    p = block[:, None] * 32 + column
    v = _scaled(x_ptr, order_ptr, scale_ptr, m, p, inside[:, None], K, HAS_ORDER)
    if HAS_OUTLIERS:
        tl.store(xf_ptr + p.to(tl.int64) * M + m, v, mask=inside[:, None])
    largest = tl.maximum(tl.max(tl.abs(v), 1), SMALLEST_TOP)
    inverse = (32767.0 / largest)[:, None]
    # The sum is 0, or NaN when an activation is not finite: max alone would drop a NaN.
    step = largest * (1.0 / 32767.0) + tl.sum(v * 0.0, 1)
    scaled = v * inverse
    q = tl.floor(scaled + 0.5)
    row = m * 2 if RESIDUAL else m
    at = row * P + block[:, None] * 32 + slot[None, :]
    tl.store(xq_ptr + at, q.to(tl.int16), mask=inside[:, None])
    tl.store(xs_ptr + row * (P // 32) + block, step, mask=inside)
    if RESIDUAL:
        rest = tl.floor((scaled - q) * 65534.0 + 0.5)
        tl.store(xq_ptr + P + at, rest.to(tl.int16), mask=inside[:, None])
        tl.store(xs_ptr + (row + 1) * (P // 32) + block, step * (1.0 / 65534.0), mask=inside)


@triton.jit
def _column(slot, blocks4, blocks3):
    """Stored column of a slot counted from the first block."""
    block = slot // 32
    three = (block >= blocks4) & (block < blocks4 + blocks3)
    return block * 32 + column_of_slot(slot % 32, three)


@triton.jit(do_not_specialize=["M", "blocks4", "blocks3"])
def claq_scale_activations(
    x_ptr,
    order_ptr,
    scale_ptr,
    xh_ptr,
    xs_ptr,
    xf_ptr,
    M,
    K,
    P,
    blocks4,
    blocks3,
    HAS_ORDER: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """float16 activations for :func:`.gemm.claq_gemm`. Grid ``(M,)``.

    Args:
        xh_ptr: fp16 ``[M, P]`` in slot order, largest magnitude of a row 2**14.
        xs_ptr: fp32 ``[M]``: the activation is ``xs[m] * xh[m, :]``.
        COLUMNS: columns a step, a power of two, at least 32.
        WHOLE: one step holds all columns, so that they are gathered once.

    The others are those of :func:`claq_quantize_activations`.
    """
    m = tl.program_id(0).to(tl.int64)
    if WHOLE:
        s = tl.arange(0, COLUMNS)
        p = _column(s, blocks4, blocks3)
        v = _scaled(x_ptr, order_ptr, scale_ptr, m, p, s < P, K, HAS_ORDER)
        top = tl.maximum(tl.max(tl.abs(v), 0), SMALLEST_TOP)
        step = top * (1.0 / 16384.0) + tl.sum(v * 0.0, 0)
        inverse = 16384.0 / top
        tl.store(xh_ptr + m * P + s, (v * inverse).to(tl.float16), mask=s < P)
        if HAS_OUTLIERS:
            tl.store(xf_ptr + p.to(tl.int64) * M + m, v, mask=s < P)
    else:
        largest = tl.zeros([COLUMNS], tl.float32)
        poison = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, P, COLUMNS):
            p = start + tl.arange(0, COLUMNS)
            v = _scaled(x_ptr, order_ptr, scale_ptr, m, p, p < P, K, HAS_ORDER)
            largest = tl.maximum(largest, tl.abs(v))
            poison += v * 0.0
        top = tl.maximum(tl.max(largest, 0), SMALLEST_TOP)
        step = top * (1.0 / 16384.0) + tl.sum(poison, 0)
        inverse = 16384.0 / top
        for start in range(0, P, COLUMNS):
            s = start + tl.arange(0, COLUMNS)
            p = _column(s, blocks4, blocks3)
            v = _scaled(x_ptr, order_ptr, scale_ptr, m, p, s < P, K, HAS_ORDER)
            tl.store(xh_ptr + m * P + s, (v * inverse).to(tl.float16), mask=s < P)
            if HAS_OUTLIERS:
                tl.store(xf_ptr + p.to(tl.int64) * M + m, v, mask=s < P)
    tl.store(xs_ptr + m, step)
