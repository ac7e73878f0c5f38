"""Quantizing one column: reserve outliers, fit the codebook, round it to what is stored, assign codes.

This is the inner step of the error-feedback loop (gptq.py) and of coordinate descent (descent.py). It works on NumPy
arrays: at a thousand values a column, the overhead of a call counts more than the arithmetic. Where libclaq is there it
does the same in native code (native.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import native
from .kmeans import SortedValues, centroids_of, nearest
from .outliers import locate, split_reserved
from .scales import round_codebook
from .settings import LayerSettings

_NOTHING = np.zeros(0, dtype=np.int64)
_NO_VALUES = np.zeros(0, dtype=np.float16)


@dataclass
class Column:
    """One quantized column of N weights (divided by their row scales).

    Attributes:
        codes: uint8 ``[N]``.
        integers, scale: the stored codebook: int8 ``[2^b]`` ascending, float16.
        rows, extra: reserved weights: their rows, ascending, and the float16 added to the codebook entry.
    """

    codes: npt.NDArray[np.uint8]
    integers: npt.NDArray[np.int8]
    scale: np.float16
    rows: npt.NDArray[np.int64]
    extra: npt.NDArray[np.float16]

    @property
    def value(self) -> npt.NDArray[np.float32]:
        """float32 ``[N]``, exactly what a reader decodes, outliers included. Computed at each call: kept, it would take four
        times what the column does."""
        value: npt.NDArray[np.float32] = (self.integers.astype(np.float32) * np.float32(self.scale))[self.codes]
        if len(self.rows):
            # In the order of operations of QuantizedLinear.dequantize, so that the loop believes in the very bits a
            # reader sees.
            entry = self.integers[self.codes[self.rows]].astype(np.float32)
            value[self.rows] = (entry + self.extra.astype(np.float32)) * np.float32(self.scale)
        return value


class ColumnCoder:
    """Quantizes columns the way ``settings`` says.

    Args:
        settings: k-means and outlier switches.
        weights: how much each row's squared error counts in the fit, float64 ``[N]``; None = all alike.

    Attributes:
        native: whether libclaq does the work; the results are the same.
    """

    def __init__(self, settings: LayerSettings, weights: npt.NDArray[np.float64] | None = None) -> None:
        self.settings = settings
        self.weights = weights
        self.native = native.enabled()

    def quantize(
        self, column: npt.NDArray[np.float32], width: int, reserve: int, start: npt.NDArray[Any] | None = None
    ) -> Column:
        """Fit and code one column.

        Args:
            column: float32 ``[N]``, N >= 1.
            width: code width in bits.
            reserve: weights to keep as outliers, less than N.
            start: ascending centroids to run Lloyd from instead of the method's own start.
        """
        s = self.settings
        if self.native:
            first = None if start is None else np.resize(start, (1, native.MOST_CENTROIDS)).astype(np.float64)
            coded = native.quantize_columns(
                column[None], [width], [reserve], s, row_weight=self.weights, start=first, threads=1
            )
            return from_native(coded, 0, width)
        if self.weights is None:
            ordered, mass = np.sort(column), None
        else:
            by_value = np.argsort(column, kind="stable")
            ordered, mass = column[by_value], self.weights[by_value]
        low = high = 0
        reach = 0.0
        if reserve:
            low, high = split_reserved(ordered, reserve, s.outlier_choice)
            reach = float(max(abs(ordered[0]), abs(ordered[-1])))
        inner = slice(0, None) if s.fit_outliers else slice(low, len(ordered) - high)
        data = SortedValues(ordered[inner].astype(np.float64), None if mass is None else mass[inner])
        centroids, _ = centroids_of(data, 1 << width, s.kmeans, s.kmeans_iterations, start)
        integers, scale, table = round_codebook(centroids, reach)
        rows = locate(column, ordered, low, high) if reserve else _NOTHING
        return _encode(column, integers, scale, table, rows)

    def recode(
        self,
        column: npt.NDArray[np.float32],
        integers: npt.NDArray[np.int8],
        scale: np.float16,
        rows: npt.NDArray[np.int64],
    ) -> Column:
        """Code a column with the codebook and the outlier positions it already has."""
        return _encode(column, integers, scale, integers.astype(np.float32) * np.float32(scale), rows)

    def replace_codebook(self, present: Column, centroids: npt.NDArray[Any]) -> Column:
        """The same codes and outliers with other centroids (in any order), rounded to what is stored."""
        by_value = np.argsort(centroids, kind="stable")
        place = np.empty(len(by_value), dtype=np.uint8)
        place[by_value] = np.arange(len(by_value))
        value = present.value
        reach = float(np.abs(value[present.rows]).max()) if len(present.rows) else 0.0
        integers, scale, table = round_codebook(centroids[by_value], reach)
        return _encode(value, integers, scale, table, present.rows, place[present.codes])


def from_native(coded: native.CodedColumns, i: int, width: int) -> Column:
    """Column ``i`` of what libclaq quantized."""
    kept = slice(coded.first_outlier[i], coded.first_outlier[i] + coded.outliers[i])
    return Column(
        coded.codes[i],
        coded.codebook[i, : 1 << width],
        coded.scale[i],
        coded.outlier_row[kept].astype(np.int64),
        coded.outlier_extra[kept],
    )


def _encode(
    column: npt.NDArray[np.float32],
    integers: npt.NDArray[np.int8],
    scale: np.float16,
    table: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    codes: npt.NDArray[np.uint8] | None = None,
) -> Column:
    if codes is None:
        codes = nearest(column, table).astype(np.uint8)
    extra = _NO_VALUES
    if len(rows) and scale > 0:
        entry = integers[codes[rows]].astype(np.float32)
        extra = (column[rows] / np.float32(scale) - entry).astype(np.float16)
    elif len(rows):
        rows = _NOTHING
    return Column(codes, integers, scale, rows, extra)
