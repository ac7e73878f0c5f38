"""From partial sums to y: sum of the splits in a fixed order, outliers, row scale, bias, rounding to the dtype of x."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "splits"])
def claq_finish(
    part_ptr,
    xs_ptr,
    xf_ptr,
    row_scale_ptr,
    outlier_ptr_ptr,
    outlier_index_ptr,
    outlier_value_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    splits,
    SCALED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTORS: tl.constexpr,
    ENTRIES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """``y[m, n] = row_scale[n] * (xs[m] * Σ_s part[s, m, n] + Σ_j value[j] * xf[index[j], m]) + bias[n]``.

    Grid ``(ceil(N / FEATURES), ceil(M / VECTORS))``.

    Args:
        part_ptr: fp32 ``[splits, M, N]``, or ``[splits, 2 * M, N]`` with RESIDUAL (two rows a vector, both summed).
        xs_ptr: fp32 ``[M]``, read if SCALED.
        xf_ptr: fp32 ``[P, M]``, read if HAS_OUTLIERS.
        y_ptr: ``[M, N]``.
        ENTRIES: outliers of an output feature that are read at a time.
        SPLITS: splits that are read at a time.
    """
    n = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    m = tl.program_id(1) * VECTORS + tl.arange(0, VECTORS)
    inside = (m < M)[:, None] & (n < N)[None, :]
    total = tl.zeros([VECTORS, FEATURES], tl.float32)
    # A product may have 2**31 elements and more: where a row begins is counted in 64 bits, before the loop.
    length = tl.cast(N, tl.int64) * (2 if RESIDUAL else 1)
    rows = part_ptr + m[:, None] * length + n[None, :]
    # Several splits a step: their loads are in flight together.
    for start in range(0, splits, SPLITS):
        s = start + tl.arange(0, SPLITS)
        wanted = (s < splits)[:, None, None] & inside[None, :, :]
        at = rows[None, :, :] + (s * M * length)[:, None, None]
        values = tl.load(at, mask=wanted, other=0.0)
        if RESIDUAL:
            values += tl.load(at + N, mask=wanted, other=0.0)
        total += tl.sum(values, 0)
    if SCALED:
        total *= tl.load(xs_ptr + m, mask=m < M, other=0.0)[:, None]
    if HAS_OUTLIERS:
        first = tl.load(outlier_ptr_ptr + n, mask=n < N, other=0)
        last = tl.load(outlier_ptr_ptr + n + 1, mask=n < N, other=0)
        extra = tl.zeros([FEATURES, VECTORS], tl.float32)
        for start in range(0, tl.max(last - first, 0), ENTRIES):
            entry = first[:, None] + start + tl.arange(0, ENTRIES)[None, :]
            mine = entry < last[:, None]
            column = tl.load(outlier_index_ptr + entry, mask=mine, other=0).to(tl.int32)
            value = tl.load(outlier_value_ptr + entry, mask=mine, other=0.0).to(tl.float32)
            x = tl.load(
                xf_ptr + column[:, :, None].to(tl.int64) * M + m[None, None, :],
                mask=mine[:, :, None] & (m < M)[None, None, :],
                other=0.0,
            )
            extra += tl.sum(value[:, :, None] * x, 1)
        total += tl.trans(extra)
    total *= tl.load(row_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)
