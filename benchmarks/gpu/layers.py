"""Random layers and tables in the format of docs/format.md, for the GPU benchmarks."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from machine import Sizes

from claq_export.format.layer import QuantizedLinear, index_dtype, storage_order

BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}
"""Largest error of a product, as a share of the largest output, by dtype; see :func:`bound_of`."""


def share(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value expected."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def bound_of(x: torch.Tensor, dense: torch.Tensor) -> float:
    """Largest error of ``x`` times a layer of the ``dense`` weight ``[out, in]`` (float64), on one device.

    In float32 many rows are multiplied by cuBLAS, whose additions round in an order of their own: twice the error of
    PyTorch's float32 product of the same matrices is allowed there, if that is more.
    """
    bound = BOUNDS[x.dtype]
    if x.dtype == torch.float32:
        bound = max(bound, 2 * share(x @ dense.float().T, x.double() @ dense.T))
    return bound


def layer_of(
    in_features: int,
    out_features: int,
    widths: tuple[int, ...],
    outliers: float = 0.0,
    full_row: bool = False,
    exact_rows: float = 0.0,
) -> QuantizedLinear:
    """A random layer on the CPU; ``outliers`` is their share, ``full_row`` reserves every weight of the last output,
    ``exact_rows`` those of a share of the outputs, scattered, as a vocabulary's frequent tokens are."""
    bits = torch.tensor(widths)[torch.randint(len(widths), (in_features,))]
    order, columns = storage_order(bits)
    real = order < in_features
    rows = sum(width * count for width, count in zip((4, 3, 2), columns, strict=True)) // 32
    entries = sum(count << width for width, count in zip((4, 3, 2), columns, strict=True))
    shape = (out_features, order.numel())
    index, ptr = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    if outliers or full_row or exact_rows:  # else a table of a billion weights would be searched for none
        reserved = torch.rand(shape) < outliers
        if full_row:
            reserved[-1] = True
        reserved[torch.randperm(out_features)[: math.ceil(exact_rows * out_features)]] = True
        reserved &= real
        index = reserved.nonzero()[:, 1]
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), reserved.sum(1).cumsum(0)]).to(torch.int32)
    layer = QuantizedLinear(
        in_features=in_features,
        out_features=out_features,
        columns=columns,
        codes=torch.randint(-(1 << 31), 1 << 31, (rows, out_features)).to(torch.int32).view(torch.uint32),
        codebook=torch.randint(-128, 128, (entries,), dtype=torch.int8),
        scale=(torch.rand(order.numel()) * 0.002 + 1e-4).to(torch.float16) * real,
        row_scale=(torch.rand(out_features) + 0.5).to(torch.float16),
        order=order.to(torch.int32).to(index_dtype(in_features)),
        outlier_ptr=ptr if index.numel() else ptr[:0],
        outlier_index=index.to(torch.int32).to(index_dtype(order.numel() - 1)),
        outlier_value=(torch.randn(index.numel()) * 100).to(torch.float16),
    )
    layer.validate()
    return layer


def arguments(layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
    """Arguments of claq::linear."""
    empty = x.new_zeros(0) if bias is None else bias
    return (x, *layer.tensors().values(), empty, layer.in_features, layer.out_features, list(layer.columns))


def weight_bytes(layer: QuantizedLinear) -> int:
    """Bytes of the packed weight with all its tables."""
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors().values())


def copies_of(layer: QuantizedLinear, sizes: Sizes) -> list[QuantizedLinear]:
    """The layer and clones of it, as many as no L2 cache holds."""
    clones = [
        dataclasses.replace(layer, **{name: tensor.clone() for name, tensor in layer.tensors().items()})
        for _ in range(sizes.copies(weight_bytes(layer)) - 1)
    ]
    return [layer, *clones]
