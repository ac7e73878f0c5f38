"""Building blocks of the Triton kernels: byte permute, dot products of packed integers, and decoding of packed codes.

A block of 32 stored columns is decoded in four *octets* of eight columns. An octet yields, for a pair of output
features ``(a, b)``, four *quads*: 32-bit words of int8 centroids ``[a.p, a.q, b.p, b.q]`` for a pair of columns
``(p, q)``, low byte first. The columns come in the order that costs no instruction, the *slot order*
(:func:`column_of_slot`); activations are stored in the same order.

Nothing here reads a table in memory by code: four two-bit codes are the selector of a byte permute, which reads eight
bytes of codebook held in registers. Under ``TRITON_INTERPRET=1`` the inline PTX is replaced by the same integer
arithmetic in NumPy.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = bool(triton.knobs.runtime.interpret)
"""True when Triton's interpreter runs the kernels on CPU tensors; fixed when this module is imported."""

_ASM = tl.constexpr(not INTERPRET)

# Selectors of prmt, low nibble first: byte i of the result is byte s[i] of the eight bytes (b, a).
_INTERLEAVE_LOW = tl.constexpr(0x5140)  # a0 b0 a1 b1
_INTERLEAVE_HIGH = tl.constexpr(0x7362)  # a2 b2 a3 b3
_GROUPS_0_2 = tl.constexpr(0x6240)  # a0 b0 a2 b2
_GROUPS_1_3 = tl.constexpr(0x7351)  # a1 b1 a3 b3

if INTERPRET:
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def _numpy(value, dtype):
        data = value.handle.data if isinstance(value, tl.tensor) else np.asarray(getattr(value, "value", value))
        return data.astype(np.int64, copy=False).astype(dtype)

    def _tensor(data):
        return tl.tensor(TensorHandle(data, tl.int32), tl.block_type(tl.int32, list(data.shape)))

    def prmt(a, b, selector):
        """PTX ``prmt.b32`` for selectors without the sign bit."""
        a, b, s = np.broadcast_arrays(_numpy(a, np.uint32), _numpy(b, np.uint32), _numpy(selector, np.uint32))
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.zeros_like(both)
        for i in range(4):
            nibble = ((s >> np.uint32(4 * i)) & np.uint32(15)).astype(np.uint64)
            # Bit 3 of a nibble copies the sign bit of the byte instead of the byte: never meant here.
            assert i > 1 or not (nibble & np.uint64(8)).any()
            byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            result |= byte << np.uint64(8 * i)
        return _tensor(result.astype(np.uint32).view(np.int32))

    def _dp2a(x, quad, accumulator, first):
        x, q, c = np.broadcast_arrays(_numpy(x, np.int32), _numpy(quad, np.int32), _numpy(accumulator, np.int32))
        x, q = np.ascontiguousarray(x).view(np.int16), np.ascontiguousarray(q).view(np.int8)
        x = x.reshape(*c.shape, 2).astype(np.int32)
        q = q.reshape(*c.shape, 4)[..., first : first + 2].astype(np.int32)
        return _tensor(c + (x * q).sum(-1, dtype=np.int32))

    def dp2a_low(x, quad, accumulator):
        """``accumulator + x[0] * quad[0] + x[1] * quad[1]``: two int16 by the two low int8."""
        return _dp2a(x, quad, accumulator, 0)

    def dp2a_high(x, quad, accumulator):
        """``accumulator + x[0] * quad[2] + x[1] * quad[3]``: two int16 by the two high int8."""
        return _dp2a(x, quad, accumulator, 2)

else:

    @triton.jit
    def prmt(a, b, selector):
        """PTX ``prmt.b32``: byte i of the result is byte ``(selector >> 4i) & 7`` of the eight bytes of (a, b)."""
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def dp2a_low(x, quad, accumulator):
        """``accumulator + x[0] * quad[0] + x[1] * quad[1]``: two int16 by the two low int8."""
        return tl.inline_asm_elementwise(
            "dp2a.lo.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [x, quad, accumulator], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def dp2a_high(x, quad, accumulator):
        """``accumulator + x[0] * quad[2] + x[1] * quad[3]``: two int16 by the two high int8."""
        return tl.inline_asm_elementwise(
            "dp2a.hi.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [x, quad, accumulator], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _select_bits(a, b, MASK: tl.constexpr):
    """``(a & MASK) | (b & ~MASK)`` in one instruction (the compiler splits a constant mask into two)."""
    if _ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xE4;",
            "=r,r,r,r",
            [a, b, tl.full([1, 1], MASK, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return (a & MASK) | (b & ~MASK)


@triton.jit
def _and_or(a, MASK: tl.constexpr, BITS: tl.constexpr):
    """``(a & MASK) | BITS`` in one instruction."""
    if _ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [a, tl.full([1, 1], MASK, tl.int32), tl.full([1, 1], BITS, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return (a & MASK) | BITS


@triton.jit
def load_words4(pointer):
    """Four neighbouring 32-bit words, 16-byte aligned: one 128-bit load (Triton itself would issue four)."""
    if _ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return (tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3))


@triton.jit
def column_of_slot(slot, three_bits):
    """Column 0..31 of a block held by slot 0..31 of the slot order.

    Within four columns the order is 0, 2, 1, 3; in three-bit blocks the middle two groups of four columns of each half
    change places as well.
    """
    grouped = (slot & 0b11100) | ((slot & 1) << 1) | ((slot >> 1) & 1)
    swapped = (grouped & 0b10011) | ((grouped & 0b00100) << 1) | ((grouped & 0b01000) >> 1)
    return tl.where(three_bits, swapped, grouped)


@triton.jit
def share_of_group(before, blocks, total, split, splits, STEP: tl.constexpr):
    """The blocks of one width that a split takes: ``(low, high)``, ``low`` a multiple of STEP; none if ``low >= high``.

    All widths' blocks, in steps of STEP (the last step of a width may be short), are dealt out in one row, so that the
    splits differ by one step at most.

    Args:
        before: steps of the widths before this one.
        blocks: blocks of this width.
        total: steps of all widths.
    """
    low = tl.maximum(total * split // splits - before, 0) * STEP
    high = tl.minimum((total * (split + 1) // splits - before) * STEP, blocks)
    return low, high


@triton.jit
def load_pair(codes_ptr, row, lane, N, VECTOR: tl.constexpr):
    """Words of output features ``2 * lane`` and ``2 * lane + 1`` in rows ``row`` of ``codes``; 0 past the last feature.

    ``VECTOR``: N is a multiple of four and ``codes_ptr`` points to 64-bit words.
    """
    if VECTOR:
        pairs = N // 4 * 2
        both = tl.load(codes_ptr + row[:, None] * pairs + lane[None, :], mask=(lane < pairs)[None, :], other=0)
        low = both.to(tl.int32)
        high = (both >> 32).to(tl.int32)
    else:
        even = lane * 2
        at = row[:, None] * N + even[None, :]
        low = tl.load(codes_ptr + at, mask=(even < N)[None, :], other=0)
        high = tl.load(codes_ptr + at + 1, mask=(even + 1 < N)[None, :], other=0)
    return (low, high)


@triton.jit
def load_block(codes_ptr, first_row, block, lane, N, BITS: tl.constexpr, VECTOR: tl.constexpr):
    """The words of one block of 32 columns for a pair of output features: ``2 * BITS`` tensors, row by row."""
    words = ()
    for r in tl.static_range(BITS):
        words = words + load_pair(codes_ptr, first_row + block * BITS + r, lane, N, VECTOR)
    return words


@triton.jit
def _quads2(a, b, tables, interleave):
    both = prmt(a, b, interleave)
    # A nibble holds the codes of two columns; 4 + code selects from the second table of a permute.
    even = _and_or(both, 0x33333333, 0x40404040)
    odd = _and_or(both >> 2, 0x33333333, 0x40404040)
    return (
        prmt(tables[0], tables[2], even),
        prmt(tables[1], tables[3], odd),
        prmt(tables[4], tables[6], even >> 16),
        prmt(tables[5], tables[7], odd >> 16),
    )


@triton.jit
def _merge3(tables, FIRST: tl.constexpr, SECOND: tl.constexpr, selector):
    p = prmt(tables[2 * FIRST], tables[2 * FIRST + 1], selector)
    q = prmt(tables[2 * SECOND], tables[2 * SECOND + 1], selector)
    return _select_bits(p, q, 0x00FF00FF)


@triton.jit
def _quads3(a, b, third_a, third_b, tables, groups, interleave, shift):
    both = prmt(a, b, groups)
    third = prmt(third_a, third_b, interleave) >> shift
    # Bits 0 and 2 of a group's four third bits belong to bits 2 and 6 of the selector byte: times 4 and times 16.
    even = _select_bits(both, (third & 0x05050505) * 20, 0x33333333)
    odd = _select_bits(both >> 2, (third & 0x0A0A0A0A) * 10, 0x33333333)
    return (
        _merge3(tables, 0, 2, even),
        _merge3(tables, 1, 3, odd),
        _merge3(tables, 4, 6, even >> 16),
        _merge3(tables, 5, 7, odd >> 16),
    )


@triton.jit
def _centroids4(tables, COLUMN: tl.constexpr, selector, half):
    low = prmt(tables[4 * COLUMN], tables[4 * COLUMN + 1], selector)
    high = prmt(tables[4 * COLUMN + 2], tables[4 * COLUMN + 3], selector)
    return prmt(low, high, half)


@triton.jit
def _pair4(tables, FIRST: tl.constexpr, SECOND: tl.constexpr, nibbles):
    """Centroids of two columns for the output features a, b, c, d: quads of (a, b) and of (c, d)."""
    selector = nibbles & 0x77777777
    half = _and_or(nibbles >> 1, 0x44444444, 0x32103210)
    p = _centroids4(tables, FIRST, selector, half)
    q = _centroids4(tables, SECOND, selector >> 16, half >> 16)
    return (prmt(p, q, _INTERLEAVE_LOW), prmt(p, q, _INTERLEAVE_HIGH))


@triton.jit
def _quads4(a, b, c, d, tables):
    even_ab = _select_bits(a, b << 4, 0x0F0F0F0F)
    odd_ab = _select_bits(a >> 4, b, 0x0F0F0F0F)
    even_cd = _select_bits(c, d << 4, 0x0F0F0F0F)
    odd_cd = _select_bits(c >> 4, d, 0x0F0F0F0F)
    first = _pair4(tables, 0, 2, prmt(even_ab, even_cd, _INTERLEAVE_LOW))
    second = _pair4(tables, 1, 3, prmt(odd_ab, odd_cd, _INTERLEAVE_LOW))
    third = _pair4(tables, 4, 6, prmt(even_ab, even_cd, _INTERLEAVE_HIGH))
    fourth = _pair4(tables, 5, 7, prmt(odd_ab, odd_cd, _INTERLEAVE_HIGH))
    return (first[0], second[0], third[0], fourth[0]), (first[1], second[1], third[1], fourth[1])


@triton.jit
def load_tables(codebook_ptr, block, octet, BITS: tl.constexpr):
    """Codebooks of an octet's eight columns, ``2**BITS / 4`` words each, group of four columns by group.

    Args:
        codebook_ptr: 32-bit words of the width group's codebooks, 16-byte aligned.
        block: int32 ``[B]``, blocks within the width group.
        octet: 0..3.
    """
    WORDS: tl.constexpr = 1 << (BITS - 2)
    # The two groups of four columns in this octet; see column_of_slot.
    first = octet // 2 * 4 + octet % 2 if BITS == 3 else octet * 2
    STEP: tl.constexpr = 2 if BITS == 3 else 1
    tables = ()
    for g in tl.static_range(2):
        at = codebook_ptr + (block * 32 + (first + g * STEP) * 4) * WORDS
        for i in tl.static_range(WORDS):
            tables = tables + load_words4(at[:, None] + 4 * i)
    return tables


@triton.jit
def decode_octet(words, more, tables, BITS: tl.constexpr, OCTET: tl.constexpr):
    """Quads of eight columns, in slot order, for the output features of ``words`` and of ``more`` (:func:`load_block`).

    Returns two tuples of four int32 tensors; quad ``i`` holds slots ``8 * OCTET + 2 * i`` and the next.
    """
    if BITS == 4:
        first: tl.constexpr = 2 * OCTET
        return _quads4(words[first], words[first + 1], more[first], more[first + 1], tables)
    else:
        row: tl.constexpr = OCTET // 2 * 2
        if BITS == 2:
            interleave: tl.constexpr = _INTERLEAVE_LOW if OCTET % 2 == 0 else _INTERLEAVE_HIGH
            return (
                _quads2(words[row], words[row + 1], tables, interleave),
                _quads2(more[row], more[row + 1], tables, interleave),
            )
        else:
            groups: tl.constexpr = _GROUPS_0_2 if OCTET % 2 == 0 else _GROUPS_1_3
            third: tl.constexpr = _INTERLEAVE_LOW if OCTET < 2 else _INTERLEAVE_HIGH
            shift: tl.constexpr = 4 * (OCTET % 2)
            return (
                _quads3(words[row], words[row + 1], words[4], words[5], tables, groups, third, shift),
                _quads3(more[row], more[row + 1], more[4], more[5], tables, groups, third, shift),
            )


@triton.jit
def load_and_decode_octet(
    codes_ptr, tables, first_row, block, octet, lane0, lane1, N, BITS: tl.constexpr, VECTOR: tl.constexpr
):
    """As :func:`decode_octet`, with an octet that is known only at run time, whose words are read here."""
    row = first_row + block * BITS + (octet if BITS == 4 else octet // 2)
    a, b = load_pair(codes_ptr, row, lane0, N, VECTOR)
    c, d = load_pair(codes_ptr, row, lane1, N, VECTOR)
    if BITS == 4:
        return _quads4(a, b, c, d, tables)
    elif BITS == 2:
        interleave = tl.where(octet % 2 == 0, _INTERLEAVE_LOW, _INTERLEAVE_HIGH)
        return _quads2(a, b, tables, interleave), _quads2(c, d, tables, interleave)
    else:
        groups = tl.where(octet % 2 == 0, _GROUPS_0_2, _GROUPS_1_3)
        third = tl.where(octet < 2, _INTERLEAVE_LOW, _INTERLEAVE_HIGH)
        shift = octet % 2 * 4
        ha, hb = load_pair(codes_ptr, first_row + block * 3 + 2, lane0, N, VECTOR)
        hc, hd = load_pair(codes_ptr, first_row + block * 3 + 2, lane1, N, VECTOR)
        return (
            _quads3(a, b, ha, hb, tables, groups, third, shift),
            _quads3(c, d, hc, hd, tables, groups, third, shift),
        )


@triton.jit
def centroid_at(codes_ptr, codebook_ptr, p, n, mask, N, blocks4, blocks3):
    """Centroids of stored columns ``p`` for output features ``n``, one code at a time; fp32.

    For single weights anywhere in a layer. The matrix kernels decode whole blocks instead.

    Args:
        codes_ptr: int32 ``[R, N]``.
        codebook_ptr: int8.
        p, n, mask: int32, int32 and bool, of shapes that broadcast to that of ``p``.
    """
    columns4 = blocks4 * 32
    columns3 = blocks3 * 32
    is4 = p < columns4
    is3 = (p >= columns4) & (p < columns4 + columns3)
    local = tl.where(is4, p, tl.where(is3, p - columns4, p - columns4 - columns3))
    i = local % 32
    width = tl.where(is4, 4, tl.where(is3, 3, 2))
    group_row = tl.where(is4, 0, tl.where(is3, blocks4 * 4, blocks4 * 4 + blocks3 * 3))
    group_entry = tl.where(is4, 0, tl.where(is3, columns4 * 16, columns4 * 16 + columns3 * 8))
    row = group_row + local // 32 * width
    word = tl.load(codes_ptr + (row + tl.where(is4, i // 8, i // 16)) * N + n, mask=mask, other=0)
    third = tl.load(codes_ptr + (row + 2) * N + n, mask=mask & is3, other=0)
    code = tl.where(is4, (word >> (i % 8 * 4)) & 15, ((word >> (i % 16 * 2)) & 3) + ((third >> i) & 1) * 4)
    return tl.load(codebook_ptr + group_entry + (local << width) + code, mask=mask, other=0).to(tl.float32)


@triton.jit
def halves_of_quad(quad):
    """A quad's four int8 centroids as float16 tensors (a.p, a.q, b.p, b.q)."""
    if _ASM:
        # 0x6400 + byte is the float16 number 1024 + byte; the byte is the centroid + 128.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, l, h;
            xor.b32 t, $4, 0x80808080;
            prmt.b32 l, t, 0x64646464, 0x4140;
            prmt.b32 h, t, 0x64646464, 0x4342;
            sub.f16x2 l, l, $5;
            sub.f16x2 h, h, $5;
            mov.b32 {$0, $1}, l;
            mov.b32 {$2, $3}, h;
            }""",
            "=h,=h,=h,=h,r,r",
            [quad, tl.full([1, 1], 0x64806480, tl.int32)],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            ((quad << 24) >> 24).to(tl.float16),
            ((quad << 16) >> 24).to(tl.float16),
            ((quad << 8) >> 24).to(tl.float16),
            (quad >> 24).to(tl.float16),
        )
