"""Bits of a layer, counted as ``docs/format.md`` defines them, for quantized layers and for plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..format.layer import QuantizedLinear, index_dtype
from ..format.packing import BLOCK, WIDTHS


@dataclass(frozen=True)
class Bits:
    """Size of a layer.

    Attributes:
        nbytes: bytes of all its tensors but the bias.
        true_bits: ``8 * nbytes / (N K)``.
        nominal_bits: the paper's count: mean index width plus ``16 - width`` for each reserved weight.
    """

    nbytes: int
    true_bits: float
    nominal_bits: float


def measure(layer: QuantizedLinear) -> Bits:
    """Bits of a quantized layer, from its tensors."""
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors().values())
    bits = layer.column_bits().to(torch.int64)
    N, K = layer.out_features, layer.in_features
    freed = 0
    if layer.outliers:
        feature = layer.feature_of_column().cpu()[layer.outlier_index.cpu().to(torch.int64)]
        freed = int((16 - bits[feature]).sum())
    nominal = float(bits.to(torch.float64).mean()) + freed / (N * K)
    return Bits(nbytes, 8 * nbytes / (N * K), nominal)


def predict(
    out_features: int,
    in_features: int,
    counts: Sequence[int],
    outliers: Sequence[int] = (0, 0, 0),
    identity_order: bool | None = None,
) -> Bits:
    """Bits of a layer before it is quantized.

    Args:
        out_features, in_features: N and K.
        counts: columns of width 4, 3 and 2, adding up to K.
        outliers: reserved weights in columns of those widths.
        identity_order: whether columns are stored as they stand, which saves ``order``; None: if there is one width
            only.
    """
    N, K = out_features, in_features
    stored = [count + -count % BLOCK for count in counts]
    total = sum(stored)
    order_bytes = 2 if K <= 65535 else 4
    if identity_order is None:
        identity_order = sum(count > 0 for count in counts) == 1
    nnz = sum(outliers)
    nbytes = sum(s * w // 8 * N + (s << w) for s, w in zip(stored, WIDTHS, strict=True))
    nbytes += 2 * total + 2 * N + (0 if identity_order else order_bytes * total)
    if nnz:
        nbytes += 4 * (N + 1) + nnz * (2 + torch.empty(0, dtype=index_dtype(total - 1)).element_size())
    nominal = sum(c * w for c, w in zip(counts, WIDTHS, strict=True)) / K
    nominal += sum(o * (16 - w) for o, w in zip(outliers, WIDTHS, strict=True)) / (N * K)
    return Bits(nbytes, 8 * nbytes / (N * K), nominal)
