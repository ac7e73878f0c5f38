"""Rows of a table that are stored exactly: those of the most frequent tokens.

Text uses few tokens for most of its length, and a language model gives them most of its probability. Their rows decide how
much of the damage of a quantized vocabulary is seen, while they are a hundredth of its bytes. In the format an exact row is
one all of whose weights are reserved (docs/format.md), so no reader needs to know.
"""

from __future__ import annotations

import dataclasses

import torch

from ..format.layer import QuantizedLinear, index_dtype
from ..format.rows import take_rows

_LARGEST = 65000.0
"""Reserved values are float16 in units of the column's scale; a weight that needs more stays quantized."""


def most_frequent(frequency: torch.Tensor, share: float) -> torch.Tensor:
    """Row numbers to keep, ascending: the share of all rows that occur most often, of equally frequent ones the first.

    Args:
        frequency: non-negative ``[N]``; rows that never occur are not kept.
        share: of the rows, 0 to 1.
    """
    count = min(round(share * frequency.numel()), int((frequency > 0).sum()))
    order = torch.argsort(frequency, descending=True, stable=True)
    return order[:count].sort().values


def keep_rows(layer: QuantizedLinear, weight: torch.Tensor, rows: torch.Tensor) -> QuantizedLinear:
    """The layer with the given rows as they were; what they reserved before is replaced.

    Args:
        layer: quantized, ``[N, K]``.
        weight: float ``[N, K]``, what it was made of.
        rows: int64, ascending, of 0..N-1.
    """
    if not rows.numel():
        return layer
    device, N, P = layer.codes.device, layer.out_features, layer.stored_columns
    rows = rows.to(device)
    feature = layer.feature_of_column()
    stored = torch.nonzero(feature < layer.in_features).flatten()
    column = stored[(layer.scale[stored] > 0)]
    none = {name: getattr(layer, name)[:0] for name in ("outlier_ptr", "outlier_index", "outlier_value")}
    part = take_rows(dataclasses.replace(layer, **none), rows)
    unit = part.row_scale.to(torch.float32)[:, None] * layer.scale.to(torch.float32)[column]
    features = feature[column]
    difference = weight[rows][:, features].to(device=device, dtype=torch.float32) - part.dequantize()[:, features]
    value = torch.where(unit != 0, difference / torch.where(unit != 0, unit, 1.0), 0.0).to(torch.float16)
    place = torch.nonzero((value != 0) & (value.abs() <= _LARGEST))
    new_rows, new_columns = rows[place[:, 0]], column[place[:, 1]]
    new_values = value[place[:, 0], place[:, 1]]

    old_rows = torch.zeros(0, dtype=torch.int64, device=device)
    old_columns, old_values = old_rows, new_values[:0]
    if layer.outliers:
        counts = layer.outlier_ptr.to(torch.int64).diff()
        old_rows = torch.repeat_interleave(torch.arange(N, device=device), counts)
        kept = torch.ones(N, dtype=torch.bool, device=device)
        kept[rows] = False
        stays = kept[old_rows]
        old_rows = old_rows[stays]
        old_columns = layer.outlier_index.to(torch.int64)[stays]
        old_values = layer.outlier_value[stays]
    every_row = torch.cat([old_rows, new_rows])
    every_column = torch.cat([old_columns, new_columns])
    if not every_row.numel():
        return layer
    by_row = torch.argsort(every_row * P + every_column)
    ptr = torch.zeros(N + 1, dtype=torch.int64, device=device)
    ptr[1:] = torch.bincount(every_row, minlength=N).cumsum(0)
    result = dataclasses.replace(
        layer,
        outlier_ptr=ptr.to(torch.int32),
        outlier_index=every_column[by_row].to(torch.int32).to(index_dtype(P - 1)),
        outlier_value=torch.cat([old_values, new_values])[by_row],
    )
    result.validate()
    return result
