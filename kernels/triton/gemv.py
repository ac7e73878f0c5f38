"""Matrix times few vectors: packed codes times int16 activations with integer dot products and fp32 partial sums."""

# ruff: noqa: RUF005 - Triton's language has no starred expressions

from __future__ import annotations

import triton
import triton.language as tl

from .language import decode_octet, dp2a_high, dp2a_low, load_block, load_tables, load_words4, share_of_group


@triton.jit
def _block_products(words, more, codebook_ptr, xq_ptr, table_block, x_block, P, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Integer dot products of one block of 32 columns: 4 * ROWS accumulators (feature a, b, c, d of row 0, ...)."""
    zero = tl.zeros(words[0].shape, tl.int32)
    sums = (zero,) * (4 * ROWS)
    for octet in tl.static_range(4):
        tables = load_tables(codebook_ptr, table_block, octet, BITS)
        ab, cd = decode_octet(words, more, tables, BITS, octet)
        new = ()
        for m in tl.static_range(ROWS):
            x = load_words4((xq_ptr + m * (P // 2) + x_block * 16 + octet * 4)[:, None])
            a, b, c, d = sums[4 * m], sums[4 * m + 1], sums[4 * m + 2], sums[4 * m + 3]
            for i in tl.static_range(4):
                a = dp2a_low(x[i], ab[i], a)
                b = dp2a_high(x[i], ab[i], b)
                c = dp2a_low(x[i], cd[i], c)
                d = dp2a_high(x[i], cd[i], d)
            new = new + (a, b, c, d)
        sums = new
    return sums


@triton.jit
def _accumulate_group(
    totals,
    codes_ptr,
    codebook_ptr,
    xq_ptr,
    xs_ptr,
    N,
    P,
    first_row,
    first_block,
    before,
    blocks,
    total,
    split,
    splits,
    lane0,
    lane1,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Add this split's share of the blocks of one width to ``totals``."""
    low, high = share_of_group(before, blocks, total, split, splits, WARPS * UNROLL)
    for start in range(low, high, WARPS * UNROLL):
        # All words first, so that their loads are in flight together.
        words = ()
        for u in tl.static_range(UNROLL):
            block = tl.minimum(start + u * WARPS + tl.arange(0, WARPS), high - 1)
            words = words + (
                load_block(codes_ptr, first_row, block, lane0, N, BITS, VECTOR),
                load_block(codes_ptr, first_row, block, lane1, N, BITS, VECTOR),
            )
        for u in tl.static_range(UNROLL):
            wanted = start + u * WARPS + tl.arange(0, WARPS)
            block = tl.minimum(wanted, high - 1)
            sums = _block_products(
                words[2 * u], words[2 * u + 1], codebook_ptr, xq_ptr, block, first_block + block, P, BITS, ROWS
            )
            new = ()
            for m in tl.static_range(ROWS):
                scale = tl.load(xs_ptr + m * (P // 32) + first_block + wanted, mask=wanted < high, other=0.0)[:, None]
                for i in tl.static_range(4):
                    new = new + (totals[4 * m + i] + scale * sums[4 * m + i].to(tl.float32),)
            totals = new
    return totals


@triton.jit(do_not_specialize=["blocks4", "blocks3", "blocks2", "splits"])
def claq_gemv(
    codes_ptr,
    codebook_ptr,
    xq_ptr,
    xs_ptr,
    part_ptr,
    N,
    P,
    blocks4,
    blocks3,
    blocks2,
    splits,
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``part[s, m, n]``: the sum over the columns of split s of quantized activation times centroid.

    Grid ``(ceil(N / (4 * LANES)), splits)``. A program owns 4 * LANES output features and the s-th share of the blocks
    of every width; its WARPS warps take different blocks and are summed at the end, in a fixed order.

    Args:
        codes_ptr: packed codes, int64 when VECTOR (N a multiple of four), else int32.
        codebook_ptr: the layer's codebooks as int32 words, 16-byte aligned.
        xq_ptr: int16 ``[ROWS, P]`` activations in slot order as int32 words, 16-byte aligned.
        xs_ptr: fp32 ``[ROWS, P / 32]``, the scale of each block of activations.
        part_ptr: fp32 ``[splits, ROWS, N]``.
        blocks4, blocks3, blocks2: blocks of 32 columns of each width.
        WIDTHS: the widths the kernel has code for, as decimal digits (432, 2, ...).
        LANES: 64-bit words of codes a warp row reads at a time, twice a block.
        UNROLL: blocks a warp reads before it decodes the first.
    """
    split = tl.program_id(1)
    base = tl.program_id(0) * (2 * LANES)
    lane0 = base + tl.arange(0, LANES)
    lane1 = lane0 + LANES
    totals = (tl.zeros([WARPS, LANES], tl.float32),) * (4 * ROWS)
    steps4 = tl.cdiv(blocks4, WARPS * UNROLL)
    steps3 = tl.cdiv(blocks3, WARPS * UNROLL)
    total = steps4 + steps3 + tl.cdiv(blocks2, WARPS * UNROLL)
    if WIDTHS == 4 or WIDTHS == 432:
        totals = _accumulate_group(
            totals, codes_ptr, codebook_ptr, xq_ptr, xs_ptr, N, P, 0, 0, 0, blocks4, total, split, splits, lane0, lane1,
            4, ROWS, VECTOR, WARPS, UNROLL,
        )  # fmt: skip
    if WIDTHS == 3 or WIDTHS == 432:
        totals = _accumulate_group(
            totals, codes_ptr, codebook_ptr + blocks4 * 128, xq_ptr, xs_ptr, N, P, blocks4 * 4, blocks4, steps4, blocks3,
            total, split, splits, lane0, lane1, 3, ROWS, VECTOR, WARPS, UNROLL,
        )  # fmt: skip
    if WIDTHS == 2 or WIDTHS == 432:
        totals = _accumulate_group(
            totals, codes_ptr, codebook_ptr + blocks4 * 128 + blocks3 * 64, xq_ptr, xs_ptr, N, P,
            blocks4 * 4 + blocks3 * 3, blocks4 + blocks3, steps4 + steps3, blocks2, total, split, splits, lane0, lane1,
            2, ROWS, VECTOR, WARPS, UNROLL,
        )  # fmt: skip
    for m in tl.static_range(ROWS):
        for c in tl.static_range(2):
            pair = tl.join(totals[4 * m + 2 * c], totals[4 * m + 2 * c + 1])
            out = tl.reshape(tl.sum(pair, 0), [2 * LANES])
            n = (base + c * LANES) * 2 + tl.arange(0, 2 * LANES)
            tl.store(part_ptr + (split * ROWS + m) * N + n, out, mask=n < N)
