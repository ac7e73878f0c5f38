"""Coordinate descent after the loop: refit each column's codes, outliers and codebook against the whole layer's error.

With all other columns fixed, the layer error tr(E H E^T) as a function of column j is, up to a constant, H_jj times
the squared distance of the column from t_j = q_j - (E H)_j / H_jj; so its best codes and codebook are a k-means of
t_j (claq.md, section 5; QuantEase, arXiv 2309.01885; LNQ in GuidedQuant, arXiv 2505.07004). Each step starts from
the present codebook and is kept only if it lowers the error, so the error never rises.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .columns import ColumnCoder
from .gptq import QuantizedColumns

_REFIT_STEPS = 12


def descend(
    state: QuantizedColumns,
    target: torch.Tensor,
    hessian: torch.Tensor,
    order: list[int],
    coder: ColumnCoder,
    block: int = 128,
) -> float:
    """One sweep over all columns; updates ``state`` in place.

    Args:
        state: the layer as it is.
        target: float32 ``[K, N]``, what it should be (rows divided by their scales).
        hessian: float32 ``[K, K]``, damped.
        order: input features in the order to visit them.
        coder: fits one column; its row weights are those of the objective.
        block: columns between two products with the full error.

    Returns:
        by how much the sweep lowered sum_n weights_n (E H E^T)_nn, E in units of the row scales; never negative.
    """
    gained = 0.0
    for start in range(0, len(order), block):
        features = order[start : start + block]
        index = torch.tensor(features, device=target.device)
        pull = (hessian[index] @ (state.value - target)).cpu().numpy()
        inner = hessian[index[:, None], index].cpu().numpy()
        change = np.zeros_like(pull)
        present = state.value[index].cpu().numpy()
        for i, feature in enumerate(features):
            old = state.columns[feature]
            stiffness = inner[i, i]
            slope = pull[i] + inner[i, :i] @ change[:i] if i else pull[i]
            wanted = present[i] - slope / stiffness
            before = _distance(present[i], wanted, coder)
            best, value, after = None, present[i], before
            width = len(old.integers).bit_length() - 1
            table = old.integers.astype(np.float64) * np.float64(old.scale)
            for fresh in (
                coder.quantize(wanted, width, len(old.rows), start=table),
                coder.recode(wanted, old.integers, old.scale, old.rows),
            ):
                decoded = fresh.value
                error = _distance(decoded, wanted, coder)
                if error < after:
                    best, value, after = fresh, decoded, error
            if best is None:
                continue
            gained += float(stiffness) * (before - after)
            change[i] = value - present[i]
            present[i] = value
            state.columns[feature] = best
        state.value[index] = torch.from_numpy(present).to(target.device)
    return gained


def refit_codebooks(state: QuantizedColumns, target: torch.Tensor, hessian: torch.Tensor, coder: ColumnCoder) -> float:
    """All centroids of a layer at once, for given codes: the least-squares optimum against the Hessian (LNQ's closed
    form).

    The normal equations couple every centroid with every other; conjugate gradients solve them with one product with
    the Hessian a step and no matrix of their size. Outliers stay. The result is rounded to what is stored, and kept
    if it lowers the objective.

    Args:
        state, target, hessian, coder: as for :func:`descend`; ``state`` is updated in place.

    Returns:
        by how much the objective fell; 0 if the refit was not kept.
    """
    device = target.device
    codes = torch.from_numpy(np.stack([column.codes for column in state.columns])).to(device, torch.int64)
    free = torch.ones_like(target)
    for j, column in enumerate(state.columns):
        if len(column.rows):
            free[j, torch.from_numpy(column.rows).to(device)] = 0
    if coder.weights is not None:
        row_weights = torch.from_numpy(coder.weights).to(device=device, dtype=torch.float32)
    else:
        row_weights = torch.ones(target.shape[1], device=device)
    entries = max(len(column.integers) for column in state.columns)

    def gathered(error: torch.Tensor) -> torch.Tensor:
        """Gradient by centroid ``[K, entries]`` of half the objective, from E ``[K, N]``."""
        pull = (hessian @ error) * row_weights * free
        return torch.zeros(len(codes), entries, device=device).scatter_add_(1, codes, pull)

    def objective(error: torch.Tensor) -> float:
        return float(((hessian @ error) * error * row_weights).sum(dtype=torch.float64))

    count = torch.zeros(len(codes), entries, device=device).scatter_add_(1, codes, row_weights * free)
    scale = (count * hessian.diagonal()[:, None]).clamp(min=torch.finfo(torch.float32).tiny)
    error = state.value - target
    before = objective(error)
    step = torch.zeros(len(codes), entries, device=device)
    residual = -gathered(error)
    ready = torch.where(count > 0, residual / scale, 0)
    direction, energy = ready, float((residual * ready).sum(dtype=torch.float64))
    for _ in range(_REFIT_STEPS):
        curved = gathered(direction.gather(1, codes) * free)
        bend = float((direction * curved).sum(dtype=torch.float64))
        if not energy > 0 or not bend > 0:
            break
        step = step + (energy / bend) * direction
        residual = residual - (energy / bend) * curved
        ready = torch.where(count > 0, residual / scale, 0)
        last, energy = energy, float((residual * ready).sum(dtype=torch.float64))
        direction = ready + (energy / last) * direction
    moves = step.cpu().numpy().astype(np.float64)
    fresh = []
    for column, move in zip(state.columns, moves, strict=True):
        table = column.integers.astype(np.float64) * np.float64(column.scale)
        fresh.append(coder.replace_codebook(column, table + move[: len(table)]))
    value = torch.from_numpy(np.stack([column.value for column in fresh])).to(device)
    after = objective(value - target)
    if after >= before:
        return 0.0
    state.columns[:] = fresh
    state.value.copy_(value)
    return before - after


def _distance(value: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32], coder: ColumnCoder) -> float:
    """(Weighted) squared distance of two columns."""
    squares = np.square(value - wanted, dtype=np.float64)
    return float(squares.sum() if coder.weights is None else coder.weights @ squares)


def refit_row_scale(
    weight: torch.Tensor, decoded: torch.Tensor, row_scale: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Row scales that minimise the layer error for given codes: r_n = (w_n H q_n) / (q_n H q_n), rounded to float16.

    Args:
        weight: float32 ``[N, K]``, the original.
        decoded: float32 ``[N, K]``, the decoded weight without its row scales.
        row_scale: float16 ``[N]``, the present ones; kept where the rounded refit is no better.
        hessian: float32 ``[K, K]``, damped.
    """
    product = decoded @ hessian
    own = (product * decoded).sum(dim=1, dtype=torch.float64)
    shared = (product * weight).sum(dim=1, dtype=torch.float64)
    best = torch.where(own > 0, shared / own.clamp(min=1e-300), row_scale.to(torch.float64))
    fresh = best.clamp(-65504.0, 65504.0).to(torch.float16)

    def error(scale: torch.Tensor) -> torch.Tensor:
        s = scale.to(torch.float64)
        return s * s * own - 2 * s * shared

    better = (error(fresh) < error(row_scale)) & (fresh != 0)
    return torch.where(better, fresh, row_scale)
