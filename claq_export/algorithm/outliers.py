"""Outlier Reservation: how many weights of each column are kept in float16, and which.

Paper: section 3.4 and claq.md, 1.6. Corrected against the authors' code (claq.md, 1.8): the share is what is really
kept (both sides together), ratios follow the true column, and reserved weights take no part in the codebook fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .hessian import Hessian
from .settings import LayerSettings


def reserve_counts(
    weight: torch.Tensor, hessian: Hessian | None, scores: torch.Tensor, settings: LayerSettings
) -> torch.Tensor:
    """How many weights to reserve in each column.

    Args:
        weight: float ``[N, K]``.
        hessian: for ``reservation="saliency"``.
        scores: ``[K]``, the column ranking, for ``"dynamic"`` and for who gets what does not divide evenly.
        settings: ``outliers`` and ``reservation`` with its parameters.

    Returns:
        int64 ``[K]`` on the CPU, adding up to ``round(outliers * N * K)`` as far as no column exceeds half of its
        weights.
    """
    N, K = weight.shape
    total = round(settings.outliers * N * K)
    if total == 0:
        return torch.zeros(K, dtype=torch.int64)
    if settings.reservation == "saliency":
        importance = weight.to(torch.float32).square()
        if hessian is not None:
            importance = importance * hessian.diagonal.to(importance)
        top = importance.flatten().topk(total).indices
        counts = torch.bincount(top.cpu() % K, minlength=K)
        if int(counts.max()) > N // 2:
            # Few hot columns would take it all: of each no more than its largest half competes.
            most = importance.topk(N // 2, dim=0).values
            top = most.flatten().topk(min(total, most.numel())).indices
            counts = torch.bincount(top.cpu() % K, minlength=K)
        return counts
    ranked = torch.argsort(scores.cpu(), descending=True, stable=True)
    wish = torch.ones(K, dtype=torch.float64)
    if settings.reservation == "dynamic":
        wish[ranked[: round(settings.dynamic_top * K)]] = settings.dynamic_ratio
    wish *= total / wish.sum()
    counts = wish.floor().to(torch.int64)
    # What is left after rounding down goes to the columns that lost most by it; among equals to the higher ranked.
    rest = (wish - counts)[ranked]
    by_rest = ranked[torch.argsort(rest, descending=True, stable=True)]
    counts[by_rest[: total - int(counts.sum())]] += 1
    return counts.clamp(max=N // 2)


def split_reserved(ordered: npt.NDArray[Any], count: int, choice: str) -> tuple[int, int]:
    """How many of the ``count`` reserved weights come from the low and from the high end of a sorted column.

    Args:
        ordered: ascending ``[N]``.
        count: less than N.
        choice: ``"sides"``: half each, an odd one from the end with the larger magnitude; ``"magnitude"``: the
            largest magnitudes.
    """
    n = len(ordered)
    if choice == "sides":
        low = count // 2
        if count % 2 and -ordered[low] > ordered[n - 1 - (count - low - 1)]:
            low += 1
        return low, count - low
    ends = np.concatenate([-ordered[:count], ordered[: n - count - 1 : -1]])
    low = int((np.argsort(-ends, kind="stable")[:count] < count).sum())
    return low, count - low


def locate(values: npt.NDArray[Any], ordered: npt.NDArray[Any], low: int, high: int) -> npt.NDArray[np.int64]:
    """Rows, ascending, of the ``low`` smallest and ``high`` largest of ``values``, whose sorted copy is ``ordered``."""
    parts = []
    if low:
        edge = ordered[low - 1]
        below = np.flatnonzero(values < edge)
        parts += [below, np.flatnonzero(values == edge)[: low - len(below)]]
    if high:
        edge = ordered[len(ordered) - high]
        above = np.flatnonzero(values > edge)
        equal = np.flatnonzero(values == edge)
        parts += [above, equal[len(equal) - (high - len(above)) :]]
    return np.sort(np.concatenate(parts))
