"""Packing of 2-, 3- and 4-bit codes into the uint32 words of ``docs/format.md``, and back.

A block of 32 stored columns of width ``b`` takes ``b`` rows of words; output features are the contiguous axis.
Three bits are stored as a two-bit plane (two rows) and a one-bit plane (one row).
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Stored columns a block; every width group is a multiple of it."""

WIDTHS = (4, 3, 2)
"""Supported code widths in bits, in the order in which their groups are stored."""


def _pack_plane(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack ``values`` (int64 ``[C, N]``, each < 2**bits, C a multiple of 32/bits) into int64 words ``[C*bits/32,
    N]``."""
    per_word = 32 // bits
    lanes = values.reshape(-1, per_word, values.shape[1])
    shifts = torch.arange(per_word, device=values.device, dtype=torch.int64) * bits
    return (lanes << shifts[:, None]).sum(dim=1)


def _unpack_plane(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`_pack_plane`: int64 words ``[R, N]`` to int64 values ``[R*32/bits, N]``."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, device=words.device, dtype=torch.int64) * bits
    values = (words[:, None, :] >> shifts[:, None]) & ((1 << bits) - 1)
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
    values = codes.to(torch.int64)
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 1 << bits):
        raise ValueError(f"codes must be in 0..{(1 << bits) - 1} for {bits} bits")
    if bits == 3:
        low = _pack_plane(values & 3, 2).reshape(-1, 2, out_features)
        third = _pack_plane(values >> 2, 1).reshape(-1, 1, out_features)
        words = torch.cat([low, third], dim=1).reshape(-1, out_features)
    else:
        words = _pack_plane(values, bits)
    # Through int32 by wrap-around: torch converts int64 to uint32 on some devices only.
    return words.to(torch.int32).view(torch.uint32)


def unpack_group(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_group`: uint32 words ``[R, out_features]`` to uint8 codes ``[R * 32 / bits,
    out_features]``."""
    wide = words.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if bits == 3:
        rows = wide.reshape(-1, 3, wide.shape[1])
        low = _unpack_plane(rows[:, :2].reshape(-1, wide.shape[1]), 2)
        third = _unpack_plane(rows[:, 2], 1)
        return (low + 4 * third).to(torch.uint8)
    return _unpack_plane(wide, bits).to(torch.uint8)
