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
