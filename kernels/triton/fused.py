"""What the fused operators do with the product of a layer: take columns of it, gate one half with the other, add a residual."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def claq_add(y_ptr, residual_ptr, count, ELEMENTS: tl.constexpr):
    """``y[i] += residual[i]``, in fp32 and rounded to the dtype of y. Grid ``(ceil(count / ELEMENTS),)``."""
    i = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    total = tl.load(y_ptr + i, mask=i < count).to(tl.float32) + tl.load(residual_ptr + i, mask=i < count).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=i < count)


@triton.jit(do_not_specialize=["epsilon_bits"])
def claq_add_norm(y_ptr, residual_ptr, weight_ptr, normalized_ptr, columns, epsilon_bits, ELEMENTS: tl.constexpr):
    """``y[m] += residual[m]``, and its RMS normalization ``y[m] / sqrt(mean(y[m]²) + epsilon) * weight``. Grid ``(M,)``.

    Args:
        y_ptr, residual_ptr, normalized_ptr: ``[M, columns]``.
        weight_ptr: ``[columns]``.
        epsilon_bits: the bits of epsilon, an fp32.
    """
    at = tl.program_id(0).to(tl.int64) * columns
    squares = tl.zeros([ELEMENTS], tl.float32)
    for start in range(0, columns, ELEMENTS):
        i = start + tl.arange(0, ELEMENTS)
        total = tl.load(y_ptr + at + i, mask=i < columns, other=0.0).to(tl.float32)
        total += tl.load(residual_ptr + at + i, mask=i < columns, other=0.0).to(tl.float32)
        rounded = total.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at + i, rounded, mask=i < columns)
        # What is normalized is the sum as it is rounded.
        squares += rounded.to(tl.float32) * rounded.to(tl.float32)
    epsilon = tl.cast(epsilon_bits, tl.int32).to(tl.float32, bitcast=True)
    scale = tl.rsqrt(tl.sum(squares, 0) / columns + epsilon)
    # A thread reads what it has written itself.
    for start in range(0, columns, ELEMENTS):
        i = start + tl.arange(0, ELEMENTS)
        total = tl.load(y_ptr + at + i, mask=i < columns, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + i, mask=i < columns, other=0.0).to(tl.float32)
        tl.store(normalized_ptr + at + i, (total * scale * weight).to(y_ptr.dtype.element_ty), mask=i < columns)


@triton.jit
def claq_swiglu(product_ptr, y_ptr, half, ELEMENTS: tl.constexpr):
    """``y[m, i] = silu(product[m, i]) * product[m, half + i]``, in fp32. Grid ``(M, ceil(half / ELEMENTS))``.

    Args:
        product_ptr: ``[M, 2 * half]``.
        y_ptr: ``[M, half]``.
    """
    m = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    row = product_ptr + m * 2 * half
    gate = tl.load(row + i, mask=i < half, other=0.0).to(tl.float32)
    up = tl.load(row + half + i, mask=i < half, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + m * half + i, y.to(y_ptr.dtype.element_ty), mask=i < half)


@triton.jit(do_not_specialize=["first"])
def claq_take(product_ptr, y_ptr, N, first, columns, ELEMENTS: tl.constexpr):
    """``y[m, i] = product[m, first + i]``. Grid ``(M, ceil(columns / ELEMENTS))``.

    Args:
        product_ptr: ``[M, N]``.
        y_ptr: ``[M, columns]``.
    """
    m = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(product_ptr + m * N + first + i, mask=i < columns)
    tl.store(y_ptr + m * columns + i, value, mask=i < columns)


@triton.jit(do_not_specialize=["first"])
def claq_turn(product_ptr, cos_ptr, sin_ptr, y_ptr, N, first, columns, head, half, ELEMENTS: tl.constexpr):
    """Columns ``first .. first + columns - 1`` of the product, heads of ``head`` values, with rotary positions.

    Of each head the first ``2 * half`` values are turned, value i together with value ``i + half``; the rest stay.
    Grid ``(M, ceil(columns / ELEMENTS))``.

    Args:
        product_ptr: ``[M, N]``.
        cos_ptr, sin_ptr: ``[M, half]``.
        y_ptr: ``[M, columns]``.
    """
    m = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    place = i % head
    inside = i < columns
    turned = inside & (place < 2 * half)
    lower = place < half
    row = product_ptr + m * N + first
    value = tl.load(row + i, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(row + tl.where(lower, i + half, i - half), mask=turned, other=0.0).to(tl.float32)
    angle = m * half + tl.where(lower, place, place - half)
    cos = tl.load(cos_ptr + angle, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=turned, other=0.0).to(tl.float32)
    y = value * cos + tl.where(lower, -other, other) * sin
    tl.store(y_ptr + m * columns + i, y.to(y_ptr.dtype.element_ty), mask=inside)
