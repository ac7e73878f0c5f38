"""Taking single linear layers out of layers that were quantized stacked (query/key/value, gate/up)."""

from __future__ import annotations

import dataclasses

from ..errors import FormatError
from .layer import QuantizedLinear


def slice_rows(layer: QuantizedLinear, start: int, stop: int) -> QuantizedLinear:
    """The layer of output features ``start`` to ``stop - 1``.

    Codes, row scales and outliers are cut; codebook, scale and order are shared with ``layer``.

    Raises:
        FormatError: the range is empty or reaches outside the layer.
    """
    if not 0 <= start < stop <= layer.out_features:
        raise FormatError(f"rows {start}..{stop} are not inside the layer's {layer.out_features} output features")
    ptr, index, value = layer.outlier_ptr, layer.outlier_index, layer.outlier_value
    if layer.outliers:
        first, last = int(ptr[start]), int(ptr[stop])
        ptr = ptr[start : stop + 1] - first if last > first else ptr[:0]
        index, value = index[first:last].clone(), value[first:last].clone()
    return dataclasses.replace(
        layer,
        out_features=stop - start,
        codes=layer.codes[:, start:stop].contiguous(),
        row_scale=layer.row_scale[start:stop].clone(),
        outlier_ptr=ptr,
        outlier_index=index,
        outlier_value=value,
    )
