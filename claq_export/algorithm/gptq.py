"""The column loop: quantize columns one after another and let the later ones make up for the error of the earlier ones.

GPTQ (arXiv 2210.17323, algorithm 1) with a k-means codebook a column (CLAQ, section 3.2; claq.md, 1.2-1.3). Columns
are processed in the order of the Hessian factor, whatever order they are stored in.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from .columns import Column, ColumnCoder
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

    The matrix products run on the device of ``target``; the columns of a block are fitted on the CPU. Within a block
    the correction of a column is gathered when it is its turn (one vector-matrix product), not scattered after each
    column: the same sums, a fraction of the memory traffic.

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
    kmeans = 0.0
    for start in range(0, count, block):
        features = order[start : start + block]
        index = torch.tensor(features, device=target.device)
        rows = target[index]
        if factor is None or errors is None:
            local_upper = local_errors = None
        else:
            stop = start + len(features)
            if start:
                rows = rows - factor.upper[:start, start:stop].T @ errors[:start]
            local_upper = factor.upper[start:stop, start:stop].T.contiguous().cpu().numpy()
            local_errors = np.empty(tuple(rows.shape), dtype=np.float32)
        local = rows.cpu().numpy()
        decoded = np.empty_like(local)
        for i, feature in enumerate(features):
            column = local[i]
            if local_upper is not None and local_errors is not None and i:
                column = column - local_upper[i, :i] @ local_errors[:i]
            tick = perf_counter()
            done = coder.quantize(column, bits[feature], reserve[feature])
            kmeans += perf_counter() - tick
            result[feature] = done
            decoded[i] = done.value
            if local_upper is not None and local_errors is not None:
                np.divide(column - done.value, local_upper[i, i], out=local_errors[i])
        value[index] = torch.from_numpy(decoded).to(target.device)
        if errors is not None and local_errors is not None:
            errors[start : start + len(features)] = torch.from_numpy(local_errors).to(target.device)
    columns = [column for column in result if column is not None]
    return QuantizedColumns(columns, value, kmeans, perf_counter() - began - kmeans)
