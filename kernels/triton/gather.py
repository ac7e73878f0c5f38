"""Rows of a layer's weight by number, as an embedding looks them up: nothing but the rows asked for is decoded."""

from __future__ import annotations

import triton
import triton.language as tl

from .language import centroid_at


@triton.jit
def _outlier_of(index_ptr, value_ptr, first, count, p, P):
    """What is added to the centroids of stored columns ``p`` in a row whose outliers are ``first`` .. ``first + count - 1``."""
    at = tl.zeros(p.shape, tl.int32) + first
    # Where column p is among the row's outliers, which ascend: in the `left` entries from `at` on, if anywhere.
    left = count
    while left > 1:
        half = left // 2
        middle = tl.load(index_ptr + at + half, mask=p < P, other=0).to(tl.int32)
        at = tl.where(middle <= p, at + half, at)
        left = left - half
    inside = p < tl.where(count > 0, P, 0)
    found = tl.load(index_ptr + at, mask=inside, other=0).to(tl.int32)
    return tl.load(value_ptr + at, mask=inside & (found == p), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["blocks4", "blocks3", "outliers"])
def claq_gather(
    ids_ptr,
    codes_ptr,
    codebook_ptr,
    scale_ptr,
    row_scale_ptr,
    order_ptr,
    outlier_ptr_ptr,
    outlier_index_ptr,
    outlier_value_ptr,
    y_ptr,
    N,
    K,
    P,
    blocks4,
    blocks3,
    outliers,
    HAS_ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``y[t, :] = W[ids[t], :]``; a number below 0 counts from the end, one outside of -N..N-1 gives a row of NaN.

    Every weight is ``((centroid + outlier) * scale) * row_scale`` in fp32, rounded in this order and then to the dtype of
    y, so that it is bit for bit the reference's. Grid ``(T, ceil(P / COLUMNS))``.

    Args:
        ids_ptr: int32 or int64 ``[T]``, any alignment.
        codes_ptr: int32 ``[R, N]``.
        codebook_ptr: int8.
        order_ptr: uint16 or int32 ``[P]``; not read unless HAS_ORDER.
        y_ptr: ``[T, K]``, any alignment.
        outliers: how many the layer has; their three tensors are not read when it is 0.
        COLUMNS: stored columns a program decodes, a power of two.
    """
    token = tl.program_id(0)
    wanted = tl.load(ids_ptr + token)
    known = (wanted >= -N) & (wanted < N)
    n = tl.where(known, tl.where(wanted < 0, wanted + N, wanted), 0).to(tl.int32)
    p = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = p < P
    value = centroid_at(codes_ptr, codebook_ptr, p, n, inside, N, blocks4, blocks3)
    first = tl.load(outlier_ptr_ptr + n, mask=outliers > 0, other=0)
    last = tl.load(outlier_ptr_ptr + n + 1, mask=outliers > 0, other=0)
    value += _outlier_of(outlier_index_ptr, outlier_value_ptr, first, last - first, p, P)
    value *= tl.load(scale_ptr + p, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(row_scale_ptr + n).to(tl.float32)
    value = tl.where(known, value, float("nan"))
    feature = tl.load(order_ptr + p, mask=inside, other=0).to(tl.int32) if HAS_ORDER else p
    tl.store(y_ptr + token.to(tl.int64) * K + feature, value.to(y_ptr.dtype.element_ty), mask=inside & (feature < K))
