"""The two scales of the format: one float16 a row, divided out before clustering, and the column's float16 under its
int8 codebook.

Error feedback must see what is stored, so every function here returns the rounded values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_FLOAT16_MAX = 65504.0
_FLOAT16_TINY = 2.0**-24
# Outlier values are stored in units of the column scale as float16; stay clear of its end so that rounding cannot
# overflow.
_OUTLIER_REACH = 60000.0
_BALANCE_ROUNDS = 8
_ROWS_AT_ONCE = 256


def row_scales(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What each row is divided by before clustering (SKIM's scaling vector in its simplest form; design.md, section 2).

    Args:
        weight: float ``[N, K]``, finite.
        kind: one of ``settings.ROW_SCALES``.

    Returns:
        float16 ``[N]``, 0 exactly for rows of zeros, else at least 2^-24.
    """
    w = weight.to(torch.float32)
    parts = [_sizes_of_rows(part, kind) for part in w.split(_ROWS_AT_ONCE)]
    peak, scale = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    if kind == "balanced":
        for _ in range(_BALANCE_ROUNDS):
            alive = scale.clamp(min=torch.finfo(torch.float32).tiny)
            columns = (w / alive[:, None]).square().mean(dim=0).sqrt().clamp(min=1e-12)
            scale = (w / columns).square().mean(dim=1).sqrt()
    elif kind == "none":
        top = peak.max()
        scale = (top * (w / top.clamp(min=torch.finfo(torch.float32).tiny)).square().mean().sqrt()).expand(w.shape[0])
    rounded = scale.clamp(_FLOAT16_TINY, _FLOAT16_MAX).to(torch.float16)
    return torch.where(peak > 0, rounded, torch.zeros_like(rounded))


def _sizes_of_rows(w: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest magnitude of each row, and its size as ``kind`` measures it."""
    peak = w.abs().amax(dim=1)
    if kind == "max":
        return peak, peak
    # Through the peak, so that squares of very small or large weights neither vanish nor overflow.
    unit = w / peak.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if kind == "mean":
        return peak, peak * unit.abs().mean(dim=1)
    return peak, peak * unit.square().mean(dim=1).sqrt()


def round_codebook(
    centroids: npt.NDArray[Any], reach: float = 0.0
) -> tuple[npt.NDArray[np.int8], np.float16, npt.NDArray[np.float32]]:
    """Centroids as int8 times a float16 scale (docs/format.md).

    Args:
        centroids: ``[k]``, finite.
        reach: largest magnitude of an outlier of this column; the scale is kept large enough to express it.

    Returns:
        int8 ``[k]`` within -127..127, the scale, and their float32 product, which is what a reader decodes.
    """
    peak = float(np.abs(centroids).max())
    ideal = min(max(peak / 127.0, reach / _OUTLIER_REACH), _FLOAT16_MAX)
    scale = np.float16(ideal)
    if float(scale) * 127.5 < peak or (reach > 0 and float(scale) * 65000.0 < reach):
        scale = np.nextafter(scale, np.float16(_FLOAT16_MAX))  # which is where it stays
    if scale == 0:
        integers = np.zeros(len(centroids), dtype=np.int8)
    else:
        integers = np.clip(np.rint(centroids / np.float64(scale)), -127, 127).astype(np.int8)
    return integers, scale, integers.astype(np.float32) * np.float32(scale)
