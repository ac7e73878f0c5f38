"""Adaptive Precision: which columns get wide codes, and how many, in groups the format stores without padding.

Paper: section 3.3 and claq.md, 1.4-1.5 (the outlier order and the 2&4 and 3&4 mixes).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigError
from ..format.packing import BLOCK
from .hessian import Hessian
from .settings import LayerSettings


def outlier_order(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """The paper's outlier order: how many weights of a column exceed ``threshold`` times the mean magnitude of the
    matrix.

    At the paper's threshold of 13 most columns count none; among equals the larger peak goes first, where the
    paper's code leaves their order to an unstable sort.

    Args:
        weight: float ``[N, K]``.
        threshold: S.

    Returns:
        float64 ``[K]``, larger = more outliers.
    """
    magnitude = weight.abs().to(torch.float32)
    count = (magnitude >= threshold * magnitude.mean()).sum(dim=0).to(torch.float64)
    peak = magnitude.amax(dim=0).to(torch.float64)
    highest = peak.max()
    return count + (0.5 * peak / highest if highest > 0 else 0.0 * peak)


def saliency(weight: torch.Tensor, hessian: Hessian | None) -> torch.Tensor:
    """``||w_j||^2 H_jj`` of each column (claq.md, section 5): float64 ``[K]``; H_jj = 1 without a Hessian."""
    squares = weight.to(torch.float32).square().sum(dim=0, dtype=torch.float64)
    return squares if hessian is None else squares * hessian.diagonal.to(device=squares.device, dtype=torch.float64)


def loss(weight: torch.Tensor, hessian: Hessian | None, damping: float, act_order: bool) -> torch.Tensor:
    """``||w_j||^2 / U_jj^2``: saliency with what the error of column j costs once later columns have made up for it;
    float64 ``[K]``."""
    squares = weight.to(torch.float32).square().sum(dim=0, dtype=torch.float64)
    if hessian is None:
        return squares
    factor = hessian.factor(damping, act_order)
    cost = torch.empty(weight.shape[1], dtype=torch.float64, device=factor.upper.device)
    cost[factor.order] = factor.upper.diagonal().to(torch.float64) ** -2
    return squares * cost.to(squares.device)


def column_scores(weight: torch.Tensor, hessian: Hessian | None, settings: LayerSettings) -> torch.Tensor:
    """The ranking that ``settings.ranking`` names: float64 ``[K]``, larger = more worthy of bits."""
    if settings.ranking == "outlier_order":
        return outlier_order(weight, settings.outlier_threshold)
    if settings.ranking == "saliency":
        return saliency(weight, hessian)
    return loss(weight, hessian, settings.damping, settings.act_order)


def group_counts(columns: int, shares: Sequence[float], offset: Sequence[float] | None = None) -> tuple[int, ...]:
    """How many of a layer's columns each width gets: whole blocks of 32 for all but one group, so that padding is
    minimal.

    Args:
        columns: K.
        shares: of each width, adding up to 1.
        offset: columns to add to each wish before rounding (what earlier layers fell short of); None = 0.

    Returns:
        counts adding up to K; at most one is not a multiple of 32 (the part block, if K has one, goes to the group
        with the most columns).
    """
    wishes = [columns * share + (offset[i] if offset else 0.0) for i, share in enumerate(shares)]
    blocks = columns // BLOCK
    exact = [min(max(wish / BLOCK, 0.0), float(blocks)) for wish in wishes]
    total = sum(exact)
    exact = [value * blocks / total if total else 0.0 for value in exact]
    counts = [int(value + 1e-9) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: blocks - sum(counts)]:
        counts[i] += 1
    result = [count * BLOCK for count in counts]
    largest = max(range(len(result)), key=lambda i: (result[i], shares[i]))
    result[largest] += columns - sum(result)
    return tuple(result)


def spread_counts(columns: Sequence[int], rows: Sequence[int], shares: Sequence[float]) -> list[tuple[int, ...]]:
    """:func:`group_counts` for all layers of a model, so that the mean width over all weights comes out as asked.

    A layer with few columns cannot hit 2.1 bits by itself in groups of 32; what it misses (in weights) is passed on
    to the next.

    Args:
        columns, rows: K and N of each layer, in order.
        shares: of each width.
    """
    owed = [0.0] * len(shares)
    result = []
    for K, N in zip(columns, rows, strict=True):
        counts = group_counts(K, shares, [debt / N for debt in owed])
        owed = [debt + N * (K * share - count) for debt, share, count in zip(owed, shares, counts, strict=True)]
        result.append(counts)
    return result


def assign_widths(scores: torch.Tensor, widths: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """Give the best-ranked columns the widest codes.

    Args:
        scores: ``[K]``, larger first; equals keep their order.
        widths: descending.
        counts: columns of each width, adding up to K.

    Returns:
        uint8 ``[K]`` on the CPU.

    Raises:
        ConfigError: counts do not add up to K.
    """
    if sum(counts) != scores.numel():
        raise ConfigError(f"{sum(counts)} columns were given widths, the layer has {scores.numel()}")
    ranked = torch.argsort(scores.cpu(), descending=True, stable=True)
    bits = torch.empty(scores.numel(), dtype=torch.uint8)
    bits[ranked] = torch.repeat_interleave(torch.tensor(list(widths), dtype=torch.uint8), torch.tensor(list(counts)))
    return bits
