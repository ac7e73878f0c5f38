"""The column loop: quantize columns one after another and let the later ones make up for the error of the earlier ones.

GPTQ (arXiv 2210.17323, algorithm 1) with a k-means codebook a column (CLAQ, section 3.2; claq.md, 1.2-1.3). Columns
are processed in the order of the Hessian factor, whatever order they are stored in.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from . import native
from .columns import Column, ColumnCoder, from_native
from .hessian import Factor


@dataclass
class QuantizedColumns:
    """All columns of a layer, rows divided by their scales.

    Attributes:
        columns: K quantized columns, by input feature.
        value: float32 ``[K, N]``: what they decode to.
        kmeans_seconds, feedback_seconds: where the time went.
    """

    columns: list[Column]
    value: torch.Tensor
    kmeans_seconds: float = 0.0
    feedback_seconds: float = 0.0


def quantize_columns(
    target: torch.Tensor,
    bits: list[int],
    reserve: list[int],
    factor: Factor | None,
    coder: ColumnCoder,
    block: int = 128,
) -> QuantizedColumns:
    """Quantize all columns, with error feedback when there is a factor.

    The matrix products run on the device of ``target``; the columns of a block are quantized on the CPU, by libclaq
    where it is there.

    Args:
        target: float32 ``[K, N]``: the weight transposed, rows divided by their scales.
        bits: K code widths.
        reserve: outliers of each column.
        factor: of the inverse Hessian; None = each column for itself.
        coder: quantizes one column.
        block: columns between two updates of all later columns.
    """
    began = perf_counter()
    count = target.shape[0]
    order = list(range(count)) if factor is None else factor.order.tolist()
    result: list[Column | None] = [None] * count
    value = torch.empty_like(target)
    errors = torch.zeros_like(target) if factor is not None else None
    quantize_block = _quantize_native if coder.native else _quantize_block
    kmeans = 0.0
    for start in range(0, count, block):
        features = order[start : start + block]
        index = torch.tensor(features, device=target.device)
        rows = target[index]
        feedback = None
        if factor is not None and errors is not None:
            stop = start + len(features)
            if start:
                rows = rows - factor.upper[:start, start:stop].T @ errors[:start]
            feedback = factor.upper[start:stop, start:stop].T.contiguous().cpu().numpy()
        widths, reserves = [bits[feature] for feature in features], [reserve[feature] for feature in features]
        done = quantize_block(rows.cpu().numpy(), widths, reserves, feedback, coder)
        kmeans += done.kmeans_seconds
        for feature, column in zip(features, done.columns, strict=True):
            result[feature] = column
        value[index] = torch.from_numpy(done.value).to(target.device)
        if errors is not None and done.error is not None:
            errors[start : start + len(features)] = torch.from_numpy(done.error).to(target.device)
    columns = [column for column in result if column is not None]
    return QuantizedColumns(columns, value, kmeans, perf_counter() - began - kmeans)


@dataclass
class _Block:
    """The columns of a block, their decoded values ``[B, N]``, and with feedback their errors divided by U_jj."""

    columns: list[Column]
    value: npt.NDArray[np.float32]
    error: npt.NDArray[np.float32] | None
    kmeans_seconds: float


def _quantize_block(
    target: npt.NDArray[np.float32],
    widths: list[int],
    reserve: list[int],
    feedback: npt.NDArray[np.float32] | None,
    coder: ColumnCoder,
) -> _Block:
    """The loop as GPTQ states it: quantize a column, take its error off all later ones of the block.

    ``feedback[i, j]``, float32 ``[B, B]``, times the error of column j is taken off column i > j; products and
    differences are rounded one by one in the order of j, which is what libclaq does too.
    """
    target = target.copy()
    value = np.empty_like(target)
    error = None if feedback is None else np.empty_like(target)
    columns, kmeans = [], 0.0
    for i, (width, kept) in enumerate(zip(widths, reserve, strict=True)):
        tick = perf_counter()
        column = coder.quantize(target[i], width, kept)
        kmeans += perf_counter() - tick
        columns.append(column)
        value[i] = column.value
        if feedback is not None and error is not None:
            np.divide(target[i] - value[i], feedback[i, i], out=error[i])
            target[i + 1 :] -= feedback[i + 1 :, i, None] * error[i]
    return _Block(columns, value, error, kmeans)


def _quantize_native(
    target: npt.NDArray[np.float32],
    widths: list[int],
    reserve: list[int],
    feedback: npt.NDArray[np.float32] | None,
    coder: ColumnCoder,
) -> _Block:
    """The same by libclaq."""
    began = perf_counter()
    coded = native.quantize_columns(
        target, widths, reserve, coder.settings, row_weight=coder.weights, feedback=feedback
    )
    columns = [from_native(coded, i, width) for i, width in enumerate(widths)]
    seconds = perf_counter() - began - coded.feedback_seconds
    return _Block(columns, coded.value, None if feedback is None else coded.error, seconds)
