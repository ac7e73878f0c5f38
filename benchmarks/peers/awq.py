"""AWQ, activation-aware weight quantization (Lin et al., arXiv 2306.00978), after the authors' auto_scale.py and
auto_clip.py.

Both searches minimise the squared output error, computed from the Hessian X^T X instead of stored activations, which is
the same number over all calibration tokens (the authors judge q/k/v and the MLP by the output of the whole attention or
MLP; here the linear's own output is judged). Scales fold into what comes before and cost no bits; o_proj is not scaled
where heads are shared, as in the authors' code.
"""

from __future__ import annotations

import torch

from .common import Quantized
from .uniform import grid, snap, stored_bits

GRID = 20
SHRINK = 0.5


def _rounded(weight: torch.Tensor, bits: int, group: int, clip: torch.Tensor | None = None) -> torch.Tensor:
    parts = []
    for number, part in enumerate(weight.split(group, dim=1)):
        if clip is not None:
            bound = clip[:, number : number + 1]
            part = part.maximum(-bound).minimum(bound)
        parts.append(snap(part, *grid(part, bits), bits))
    return torch.cat(parts, 1)


def _output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def _clip_bounds(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, frozen_rows: int) -> torch.Tensor:
    """Largest magnitude kept in each group ``[N, groups]``: the best of shrinking the maximum by up to half."""
    bounds = []
    for number, part in enumerate(weight.split(group, dim=1)):
        start = number * group
        H = hessian[start : start + part.shape[1], start : start + part.shape[1]]
        top = part.abs().amax(1, keepdim=True)
        best, kept = torch.full_like(top, float("inf")), top.clone()
        for step in range(int(SHRINK * GRID)):
            bound = top * (1 - step / GRID)
            clipped = part.maximum(-bound).minimum(bound)
            difference = snap(clipped, *grid(clipped, bits), bits) - part
            error = ((difference @ H) * difference).sum(1, keepdim=True)
            better = error < best
            best, kept = torch.where(better, error, best), torch.where(better, bound, kept)
        kept[:frozen_rows] = top[:frozen_rows]
        bounds.append(kept)
    return torch.cat(bounds, 1)


def awq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    magnitude: torch.Tensor,
    bits: int,
    group: int,
    *,
    scaled: bool = True,
    frozen_rows: int = 0,
) -> Quantized:
    """Search the scale exponent, then the clipping.

    Args:
        weight: ``[N, K]``.
        hessian: X^T X ``[K, K]`` of the unquantized model.
        magnitude: mean ``|x_k|`` ``[K]``.
        scaled: search the scale (False where it cannot be folded).
        frozen_rows: first rows that are not clipped (q and k).
    """
    N, K = weight.shape
    best, scale = float("inf"), torch.ones(K)
    for step in range(GRID if scaled else 1):
        candidate = magnitude.clamp(min=1e-4).pow(step / GRID)
        candidate = candidate / (candidate.max() * candidate.min()).sqrt()
        error = _output_error(_rounded(weight * candidate, bits, group) / candidate - weight, hessian)
        if error < best:
            best, scale = error, candidate
    scaled_weight = weight * scale
    clip = _clip_bounds(scaled_weight, hessian / scale / scale[:, None], bits, group, frozen_rows)
    return Quantized(_rounded(scaled_weight, bits, group, clip) / scale, stored_bits(N, K, bits, group))
