"""The column loop: quantize columns one after another and let the later ones make up for the error of the earlier ones.

GPTQ (arXiv 2210.17323, algorithm 1) with a k-means codebook a column (CLAQ, section 3.2; claq.md, 1.2-1.3). Columns
are processed in the order of the feedback, whatever order they are stored in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from . import native
from .columns import Column, ColumnCoder, from_native
from .feedback import Feedback

_COLUMNS_AT_ONCE = 512
"""Columns between two products with the errors of all earlier ones; the blocks in them see one another's errors each."""


@dataclass
class QuantizedColumns:
    """All columns of a layer, rows divided by their scales.

    Attributes:
        columns: K quantized columns, by input feature.
        device: of tensors made of them.
        kmeans_seconds, feedback_seconds: where the time went.
    """

    columns: list[Column]
    device: torch.device
    kmeans_seconds: float = 0.0
    feedback_seconds: float = 0.0

    @cached_property
    def value(self) -> torch.Tensor:
        """float32 ``[K, N]``: what the columns decode to; made when it is first asked for, and kept."""
        return torch.from_numpy(np.stack([column.value for column in self.columns])).to(self.device)


def quantize_columns(
    target: torch.Tensor,
    bits: list[int],
    reserve: list[int],
    feedback: Feedback | None,
    coder: ColumnCoder,
    block: int = 128,
) -> QuantizedColumns:
    """Quantize all columns, with error feedback if asked for.

    The matrix products run on the device of ``target``; the columns of a block are quantized on the CPU, by libclaq
    where it is there.

    Args:
        target: float32 ``[K, N]``: the weight transposed, rows divided by their scales, columns in the order of the
            feedback (as they stand without). With feedback it is overwritten: what a quantized column leaves to the later
            ones takes its place, so that a layer needs no second matrix of its size.
        bits: K code widths, by input feature.
        reserve: outliers of each column, by input feature.
        feedback: None = each column for itself.
        coder: quantizes one column.
        block: columns that are quantized between two products with errors.
    """
    began = perf_counter()
    count = target.shape[0]
    order = list(range(count)) if feedback is None else feedback.order.tolist()
    result: list[Column | None] = [None] * count
    quantize_block = _quantize_native if coder.native else _quantize_block
    kmeans = 0.0
    for first in range(0, count, max(block, _COLUMNS_AT_ONCE)):
        last = min(count, first + max(block, _COLUMNS_AT_ONCE))
        upper = None if feedback is None else feedback.enter(target, first, last)
        value = None if feedback is None else torch.empty_like(target[first:last])
        for start in range(first, last, block):
            stop = min(last, start + block)
            features = order[start:stop]
            rows, inner = target[start:stop], None
            if upper is not None:
                here = slice(start - first, stop - first)
                if start > first:
                    rows = rows - upper[: here.start, here].T @ target[first:start]
                inner = upper[here, here].T.contiguous().cpu().numpy()
            widths, reserves = [bits[feature] for feature in features], [reserve[feature] for feature in features]
            done = quantize_block(rows.cpu().numpy(), widths, reserves, inner, coder)
            kmeans += done.kmeans_seconds
            for feature, column in zip(features, done.columns, strict=True):
                result[feature] = column
            if value is not None and done.error is not None:
                target[start:stop] = torch.from_numpy(done.error).to(target.device)
                value[here] = torch.from_numpy(done.value).to(target.device)
        if feedback is not None and value is not None:
            feedback.leave(target, first, last, value)
    columns = [column for column in result if column is not None]
    return QuantizedColumns(columns, target.device, kmeans, perf_counter() - began - kmeans)


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
