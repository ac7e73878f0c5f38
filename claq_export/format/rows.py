"""Taking single linear layers out of layers that were quantized stacked (query/key/value, gate/up), and stacking again."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch

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
        ptr = ptr[start : stop + 1] - first if last > first else ptr.new_zeros(0)
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


def share_columns(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    """Whether two layers have the same columns, centroids and scales, as the slices of one stacked layer have."""
    if (a.in_features, a.columns, a.order.shape) != (b.in_features, b.columns, b.order.shape):
        return False
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("codebook", "scale", "order"))


def columns_key(layer: QuantizedLinear) -> tuple[object, ...]:
    """Something hashable that two layers on one device have in common exactly where they :func:`share_columns`."""
    digest = hashlib.sha256()
    for name in ("codebook", "scale", "order"):
        digest.update(getattr(layer, name).cpu().numpy().tobytes())
    return layer.codes.device, layer.in_features, layer.columns, layer.order.shape, digest.digest()


def join_rows(layers: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """The stacked layer whose slices these are, in the order of its rows; undoes :func:`slice_rows`.

    Raises:
        FormatError: the layers do not share their columns.
    """
    first = layers[0]
    if not all(share_columns(first, layer) for layer in layers[1:]):
        raise FormatError("only layers with the same codebook, scale and order can be stacked")
    ptr = first.outlier_ptr.new_zeros(0)
    if any(layer.outliers for layer in layers):
        counts = [
            layer.outlier_ptr.diff() if layer.outliers else layer.outlier_ptr.new_zeros(layer.out_features)
            for layer in layers
        ]
        total = torch.cat(counts).cumsum(0)
        ptr = torch.cat([total.new_zeros(1), total]).to(torch.int32)
    return dataclasses.replace(
        first,
        out_features=sum(layer.out_features for layer in layers),
        codes=torch.cat([layer.codes for layer in layers], 1),
        row_scale=torch.cat([layer.row_scale for layer in layers]),
        outlier_ptr=ptr,
        outlier_index=torch.cat([layer.outlier_index for layer in layers]),
        outlier_value=torch.cat([layer.outlier_value for layer in layers]),
    )


def take_rows(layer: QuantizedLinear, rows: torch.Tensor) -> QuantizedLinear:
    """The layer of the given output features, in the given order; a feature may be asked for several times.

    Codebook, scale and order are shared with ``layer``. Nothing of the size of the whole layer is made.

    Args:
        layer: on the device of ``rows``.
        rows: int64 ``[M]`` of 0..N-1.
    """
    ptr, index, value = layer.outlier_ptr, layer.outlier_index, layer.outlier_value
    if layer.outliers:
        starts = ptr.to(torch.int64)
        counts = starts.diff()[rows]
        bounds = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=rows.device)
        bounds[1:] = counts.cumsum(0)
        position = torch.arange(int(bounds[-1]), device=rows.device)
        entries = position + torch.repeat_interleave(starts[rows] - bounds[:-1], counts)
        index = index.to(torch.int32)[entries].to(index.dtype)
        value = value[entries]
        ptr = bounds.to(torch.int32) if len(entries) else ptr.new_zeros(0)
    return dataclasses.replace(
        layer,
        out_features=rows.numel(),
        # Few operators take unsigned words; moving them does not need to know their sign.
        codes=layer.codes.view(torch.int32)[:, rows].view(torch.uint32),
        row_scale=layer.row_scale[rows],
        outlier_ptr=ptr,
        outlier_index=index,
        outlier_value=value,
    )
