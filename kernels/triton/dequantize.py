"""Packed codes to a dense transposed weight ``[K, N]``, for products with many vectors."""

from __future__ import annotations

import triton
import triton.language as tl

from .language import centroid_at, column_of_slot, load_and_decode_octet, load_tables


@triton.jit
def _byte(quad, INDEX: tl.constexpr):
    """int8 number INDEX of packed words, as fp32."""
    return ((quad << (24 - 8 * INDEX)) >> 24).to(tl.float32)


@triton.jit
def _store_column(weight_ptr, quads, feature, scale, row0, row1, lane, first, features, K, COLUMN: tl.constexpr):
    """Write one column of a quad tensor for the output features ``2 * lane`` and ``2 * lane + 1``."""
    low = _byte(quads, COLUMN) * scale[:, None] * row0
    high = _byte(quads, COLUMN + 2) * scale[:, None] * row1
    n = (lane * 2)[None, :, None] + tl.arange(0, 2)[None, None, :] - first
    value = tl.join(low, high).to(weight_ptr.dtype.element_ty)
    inside = (feature < K)[:, None, None] & (n < features)
    tl.store(weight_ptr + feature[:, None, None] * features + n, value, mask=inside)


@triton.jit(do_not_specialize=["first", "blocks", "first_row", "first_block"])
def claq_dequantize(
    codes_ptr,
    codebook_ptr,
    scale_ptr,
    row_scale_ptr,
    order_ptr,
    weight_ptr,
    N,
    K,
    first,
    features,
    blocks,
    first_row,
    first_block,
    HAS_ORDER: tl.constexpr,
    BITS: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Decode the columns of one width for some output features.

    Grid ``(ceil(features / (4 * LANES)), ceil(blocks / WARPS))``.

    Args:
        codes_ptr: as for :func:`.gemv.claq_gemv`.
        codebook_ptr: the same, but from this width's first column on.
        weight_ptr: ``[K, features]``; row ``order[p]`` is written for every stored column p of this width.
        first, features: the output features to decode; ``first`` is a multiple of 4 * LANES.
        blocks, first_row, first_block: blocks of this width, and where they start in codes and among all blocks.
    """
    base = first // 2 + tl.program_id(0) * (2 * LANES)
    lane0 = base + tl.arange(0, LANES)
    lane1 = lane0 + LANES
    wanted = tl.program_id(1) * WARPS + tl.arange(0, WARPS)
    block = tl.minimum(wanted, blocks - 1)
    a = tl.load(row_scale_ptr + lane0 * 2, mask=lane0 * 2 < N, other=0.0).to(tl.float32)[None, :]
    b = tl.load(row_scale_ptr + lane0 * 2 + 1, mask=lane0 * 2 + 1 < N, other=0.0).to(tl.float32)[None, :]
    c = tl.load(row_scale_ptr + lane1 * 2, mask=lane1 * 2 < N, other=0.0).to(tl.float32)[None, :]
    d = tl.load(row_scale_ptr + lane1 * 2 + 1, mask=lane1 * 2 + 1 < N, other=0.0).to(tl.float32)[None, :]
    for octet in range(0, 4):
        tables = load_tables(codebook_ptr, block, octet, BITS)
        ab, cd = load_and_decode_octet(codes_ptr, tables, first_row, block, octet, lane0, lane1, N, BITS, VECTOR)
        for i in tl.static_range(4):
            for j in tl.static_range(2):
                slot = tl.full([WARPS], i * 2 + j, tl.int32) + octet * 8
                p = (first_block + block) * 32 + column_of_slot(slot, BITS == 3)
                feature = tl.load(order_ptr + p).to(tl.int32) if HAS_ORDER else p
                scale = tl.load(scale_ptr + p).to(tl.float32)
                _store_column(weight_ptr, ab[i], feature, scale, a, b, lane0, first, features, K, j)
                _store_column(weight_ptr, cd[i], feature, scale, c, d, lane1, first, features, K, j)


@triton.jit(do_not_specialize=["first", "blocks4", "blocks3"])
def claq_add_outliers(
    codes_ptr,
    codebook_ptr,
    scale_ptr,
    row_scale_ptr,
    order_ptr,
    outlier_ptr_ptr,
    outlier_index_ptr,
    outlier_value_ptr,
    weight_ptr,
    N,
    first,
    features,
    blocks4,
    blocks3,
    HAS_ORDER: tl.constexpr,
    FEATURES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Overwrite the dense weight where there is an outlier with ``scale * row_scale * (centroid + value)``.

    The centroid is read again, so that the sum is rounded once. Grid ``(ceil(features / FEATURES),)``.

    Args:
        codes_ptr: int32 ``[R, N]``.
        codebook_ptr: int8.
        weight_ptr, first, features: as for :func:`claq_dequantize`.
    """
    local_n = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    n = first + local_n
    low = tl.load(outlier_ptr_ptr + n, mask=local_n < features, other=0)
    high = tl.load(outlier_ptr_ptr + n + 1, mask=local_n < features, other=0)
    row_scale = tl.load(row_scale_ptr + n, mask=local_n < features, other=0.0).to(tl.float32)[:, None]
    for start in range(0, tl.max(high - low, 0), ENTRIES):
        entry = low[:, None] + start + tl.arange(0, ENTRIES)[None, :]
        mine = entry < high[:, None]
        p = tl.load(outlier_index_ptr + entry, mask=mine, other=0).to(tl.int32)
        value = tl.load(outlier_value_ptr + entry, mask=mine, other=0.0).to(tl.float32)
        centroid = centroid_at(codes_ptr, codebook_ptr, p, n[:, None], mine, N, blocks4, blocks3)
        feature = tl.load(order_ptr + p, mask=mine, other=0).to(tl.int32) if HAS_ORDER else p
        scale = tl.load(scale_ptr + p, mask=mine, other=0.0).to(tl.float32)
        weight = ((centroid + value) * scale * row_scale).to(weight_ptr.dtype.element_ty)
        tl.store(weight_ptr + feature * features + local_n[:, None], weight, mask=mine)
