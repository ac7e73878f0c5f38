"""Packing of 2-, 3- and 4-bit codes into the uint32 words of ``docs/format.md``, and back.

A block of 32 stored columns of width ``b`` takes ``b`` rows of words; output features are the contiguous axis.
Three bits are stored as a two-bit plane (two rows) and a one-bit plane (one row).
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Stored columns a block; every width group is a multiple of it."""

_CODES_AT_ONCE = (1 << 17) - 1
"""Codes that are widened to int64 together: eight bytes a weight would be more than the layer in float32. In less than a
megabyte, since larger blocks can come from the operating system and go back there each time
(:func:`~claq_export.process_memory.return_freed_memory`), which takes as long as the work on them."""

WIDTHS = (4, 3, 2)
"""Supported code widths in bits, in the order in which their groups are stored."""


def columns_at_once(out_features: int) -> int:
    """Columns to work on together, whole blocks, at most 512."""
    return min(16, max(1, _CODES_AT_ONCE // (BLOCK * max(out_features, 1)))) * BLOCK


def _pack_plane(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack ``values`` (int64 ``[C, N]``, each < 2**bits, C a multiple of 32/bits) into int64 words ``[C*bits/32,
    N]``."""
    per_word = 32 // bits
    lanes = values.reshape(-1, per_word, values.shape[1])
    shifts = torch.arange(per_word, device=values.device, dtype=torch.int64) * bits
    return (lanes << shifts[:, None]).sum(dim=1)


def _unpack_plane(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`_pack_plane`: int32 words ``[R, N]`` to int32 values ``[R*32/bits, N]``."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, device=words.device, dtype=torch.int32) * bits
    values = words[:, None, :] >> shifts[:, None]
    values &= (1 << bits) - 1  # what an arithmetic shift brings in from a word's sign, too
    return values.reshape(-1, words.shape[1])


def pack_group(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the codes of one width group.

    Args:
        codes: integer tensor ``[columns, out_features]``, values in ``0 .. 2**bits - 1``; columns a multiple of 32.
        bits: 2, 3 or 4.

    Returns:
        uint32 tensor ``[columns * bits / 32, out_features]``.

    Raises:
        ValueError: if the number of columns is not a multiple of 32, or a code does not fit its width.
    """
    columns, out_features = codes.shape
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {WIDTHS}, got {bits}")
    if columns % BLOCK:
        raise ValueError(f"a group holds a multiple of {BLOCK} columns, got {columns}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes must be in 0..{(1 << bits) - 1} for {bits} bits")
    words = torch.empty(columns * bits // 32, out_features, dtype=torch.int32, device=codes.device)
    for start in range(0, columns, columns_at_once(out_features)):
        part = codes[start : start + columns_at_once(out_features)].to(torch.int64)
        # Into int32 by wrap-around: torch converts int64 to uint32 on some devices only.
        words[start * bits // 32 : (start + len(part)) * bits // 32] = _pack_columns(part, bits).to(torch.int32)
    return words.view(torch.uint32)


def _pack_columns(values: torch.Tensor, bits: int) -> torch.Tensor:
    out_features = values.shape[1]
    if bits == 3:
        low = _pack_plane(values & 3, 2).reshape(-1, 2, out_features)
        third = _pack_plane(values >> 2, 1).reshape(-1, 1, out_features)
        return torch.cat([low, third], dim=1).reshape(-1, out_features)
    return _pack_plane(values, bits)


def unpack_group(words: torch.Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Inverse of :func:`pack_group`: uint32 words ``[R, out_features]`` to codes ``[R * 32 / bits, out_features]`` of an
    integer type."""
    columns = words.shape[0] * 32 // bits
    codes = torch.empty(columns, words.shape[1], dtype=dtype, device=words.device)
    for start in range(0, columns, columns_at_once(words.shape[1])):
        end = min(columns, start + columns_at_once(words.shape[1]))
        part = words[start * bits // 32 : end * bits // 32]
        codes[start:end] = _unpack_columns(part.view(torch.int32), bits)
    return codes


def _unpack_columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 3:
        rows = words.reshape(-1, 3, words.shape[1])
        low = _unpack_plane(rows[:, :2].reshape(-1, words.shape[1]), 2)
        third = _unpack_plane(rows[:, 2], 1)
        return low.add_(third, alpha=4)
    return _unpack_plane(words, bits)
