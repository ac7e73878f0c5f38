"""Matrix times some tens of vectors on the tensor cores: codes are decoded to float16 in registers, never in memory."""

# ruff: noqa: RUF005 - Triton's language has no starred expressions

from __future__ import annotations

import triton
import triton.language as tl

from .language import decode_octet, halves_of_quad, load_block, load_tables, share_of_group


@triton.jit
def _join(values, COUNT: tl.constexpr):
    """COUNT tensors ``[B, L]`` to one ``[B, L, 2, 2, ...]`` whose trailing dimensions count them in order."""
    if COUNT == 1:
        return values[0]
    else:
        joined = ()
        for i in tl.static_range(COUNT // 2):
            joined = joined + (tl.join(values[i], values[i + COUNT // 2]),)
        return _join(joined, COUNT // 2)


@triton.jit
def _multiply(values, x, sums, present, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    """Add the product of one output feature's weights, 32 tensors ``[BLOCKS, LANES]`` slot by slot, and ``x``.

    ``present`` is true whenever this runs, which the compiler is told; it must not know before it has chosen the layout
    of the product. There it looks at what the operand is made from, up to the nearest branch, and a join would make it
    choose a layout whose registers have to be moved around before each instruction (1.3 instructions a weight).
    """
    tl.assume(present)
    if present:
        blocks = tl.reshape(_join(values, 32), [BLOCKS, LANES, 32])
        weights = tl.reshape(tl.permute(blocks, (1, 0, 2)), [LANES, BLOCKS * 32])
    else:
        weights = tl.zeros([LANES, BLOCKS * 32], tl.float16)
    return tl.dot(weights, x, sums)


@triton.jit
def _multiply_group(
    sums,
    codes_ptr,
    codebook_ptr,
    xh_ptr,
    M,
    N,
    P,
    first_row,
    first_block,
    before,
    blocks,
    total,
    split,
    splits,
    m,
    lane0,
    lane1,
    BITS: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    low, high = share_of_group(before, blocks, total, split, splits, BLOCKS)
    for start in tl.range(low, high, BLOCKS, num_stages=STAGES):
        block = tl.minimum(start + tl.arange(0, BLOCKS), high - 1)
        words = load_block(codes_ptr, first_row, block, lane0, N, BITS, VECTOR)
        more = load_block(codes_ptr, first_row, block, lane1, N, BITS, VECTOR)
        slot = start * 32 + tl.arange(0, BLOCKS * 32)
        x = tl.load(
            xh_ptr + m[:, None] * P + (first_block * 32 + slot)[None, :],
            mask=(m < M)[:, None] & (slot < high * 32)[None, :],
            other=0.0,
        )
        a, b, c, d = (), (), (), ()
        for octet in tl.static_range(4):
            tables = load_tables(codebook_ptr, block, octet, BITS)
            ab, cd = decode_octet(words, more, tables, BITS, octet)
            for i in tl.static_range(4):
                left = halves_of_quad(ab[i])
                right = halves_of_quad(cd[i])
                a = a + (left[0], left[1])
                b = b + (left[2], left[3])
                c = c + (right[0], right[1])
                d = d + (right[2], right[3])
        xt = tl.trans(x)
        present = tl.num_programs(0) > 0
        sums = (
            _multiply(a, xt, sums[0], present, BLOCKS, LANES),
            _multiply(b, xt, sums[1], present, BLOCKS, LANES),
            _multiply(c, xt, sums[2], present, BLOCKS, LANES),
            _multiply(d, xt, sums[3], present, BLOCKS, LANES),
        )
    return sums


@triton.jit(do_not_specialize=["M", "blocks4", "blocks3", "blocks2", "splits"])
def claq_gemm(
    codes_ptr,
    codebook_ptr,
    xh_ptr,
    part_ptr,
    M,
    N,
    P,
    blocks4,
    blocks3,
    blocks2,
    splits,
    WIDTHS: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``part[s, m, n]``: the sum over the columns of split s of float16 activation times centroid.

    Grid ``(ceil(N / (4 * LANES)), ceil(M / VECTORS), splits)``. The decoded weights are the left operand, so that few
    vectors fill the narrow side of the tensor core's tile.

    Args:
        xh_ptr: fp16 ``[M, P]`` in slot order.
        part_ptr: fp32 ``[splits, M, N]``.
        VECTORS: rows of x a program, at least 8.
        BLOCKS: blocks of 32 columns decoded a step, one a warp.

    The others are those of :func:`.gemv.claq_gemv`.
    """
    split = tl.program_id(2)
    base = tl.program_id(0) * (2 * LANES)
    lane0 = base + tl.arange(0, LANES)
    lane1 = lane0 + LANES
    # Products and activations may have 2**31 elements and more. The place of a program's first row is counted in 64 bits, once;
    # what lies between its rows is not, as that would take twice the registers.
    first = tl.program_id(1) * VECTORS
    xh_ptr += first.to(tl.int64) * P
    part_ptr += (split * M + first).to(tl.int64) * N
    M -= first
    m = tl.arange(0, VECTORS)
    zero = tl.zeros([LANES, VECTORS], tl.float32)
    sums = (zero, zero, zero, zero)
    steps4 = tl.cdiv(blocks4, BLOCKS)
    steps3 = tl.cdiv(blocks3, BLOCKS)
    total = steps4 + steps3 + tl.cdiv(blocks2, BLOCKS)
    if WIDTHS == 4 or WIDTHS == 432:
        sums = _multiply_group(
            sums, codes_ptr, codebook_ptr, xh_ptr, M, N, P, 0, 0, 0, blocks4, total, split, splits, m, lane0, lane1,
            4, VECTOR, LANES, BLOCKS, STAGES,
        )  # fmt: skip
    if WIDTHS == 3 or WIDTHS == 432:
        sums = _multiply_group(
            sums, codes_ptr, codebook_ptr + blocks4 * 128, xh_ptr, M, N, P, blocks4 * 4, blocks4, steps4, blocks3,
            total, split, splits, m, lane0, lane1, 3, VECTOR, LANES, BLOCKS, STAGES,
        )  # fmt: skip
    if WIDTHS == 2 or WIDTHS == 432:
        sums = _multiply_group(
            sums, codes_ptr, codebook_ptr + blocks4 * 128 + blocks3 * 64, xh_ptr, M, N, P,
            blocks4 * 4 + blocks3 * 3, blocks4 + blocks3, steps4 + steps3, blocks2, total, split, splits, m, lane0, lane1,
            2, VECTOR, LANES, BLOCKS, STAGES,
        )  # fmt: skip
    for c in tl.static_range(2):
        pair = tl.trans(tl.join(sums[2 * c], sums[2 * c + 1]), (1, 0, 2))
        out = tl.reshape(pair, [VECTORS, 2 * LANES])
        n = (base + c * LANES) * 2 + tl.arange(0, 2 * LANES)
        at = part_ptr + m[:, None] * N + n[None, :]
        tl.store(at, out, mask=(m < M)[:, None] & (n < N)[None, :])
