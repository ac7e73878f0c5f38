"""Plain torch references of claq's operators: dequantize, then what the dense layer does, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from claq_export.format.layer import TENSOR_NAMES, QuantizedLinear
from claq_export.format.rows import take_rows


def reference_linear(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    in_features: int,
    out_features: int,
    columns: Sequence[int],
) -> torch.Tensor:
    """``y = x Wᵀ + b`` with the weight of ``docs/format.md``, computed in float32 on the tensors' device.

    Args:
        x: ``[..., in_features]`` of any floating dtype.
        tensors: codes, codebook, scale, row_scale, order, outlier_ptr, outlier_index, outlier_value and bias; absent
            parts have length zero. They are trusted: see :meth:`claq_export.format.layer.QuantizedLinear.validate`.
        columns: stored columns of width 4, 3 and 2.

    Returns:
        ``[..., out_features]``, contiguous, in the dtype of ``x``.
    """
    layer = _layer(tensors[:-1], in_features, out_features, columns)
    bias = tensors[-1].to(torch.float32) if tensors[-1].numel() else None
    y = torch.nn.functional.linear(x.reshape(-1, in_features).to(torch.float32), layer.dequantize(), bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


def exact_linear(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    in_features: int,
    out_features: int,
    columns: Sequence[int],
    features: torch.Tensor,
) -> torch.Tensor:
    """Some outputs of :func:`reference_linear`, in float64: no setting of PyTorch makes such products coarser, as TF32 does.

    Args:
        x: ``[M, in_features]``.
        features: int64, the outputs that are wanted; of no others a weight is decoded.

    Returns:
        float64 ``[M, len(features)]``.
    """
    layer = take_rows(_layer(tensors[:-1], in_features, out_features, columns), features)
    bias = tensors[-1][features].to(torch.float64) if tensors[-1].numel() else None
    return torch.nn.functional.linear(x.to(torch.float64), layer.dequantize().to(torch.float64), bias)


def reference_embedding(
    indices: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    in_features: int,
    out_features: int,
    columns: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the weight of ``docs/format.md``; only those that are asked for are dequantized.

    Args:
        indices: int32 or int64 of any shape, -out_features..out_features-1; below zero counts from the end.
        tensors: codes, codebook, scale, row_scale, order, outlier_ptr, outlier_index and outlier_value, trusted.
        columns: stored columns of width 4, 3 and 2.
        dtype: of the result, rounded from float32.

    Returns:
        ``[*indices.shape, in_features]``.

    Raises:
        IndexError: an index is out of range, on the CPU. To look would mean to wait for a GPU: there the row is NaN.
    """
    rows = indices.reshape(-1).to(torch.int64)
    if not rows.is_cuda:
        check_indices(rows, out_features)
    layer = _layer(tensors, in_features, out_features, columns)
    shape = (*indices.shape, in_features)
    if not rows.numel():
        return torch.empty(shape, dtype=dtype, device=indices.device)
    y = take_rows(layer, rows.remainder(out_features)).dequantize(dtype)
    if rows.is_cuda:
        y = y.masked_fill(((rows < -out_features) | (rows >= out_features))[:, None], torch.nan)
    return y.reshape(shape)


def check_indices(rows: torch.Tensor, out_features: int) -> None:
    """Refuse row numbers ``[M]`` outside -out_features..out_features-1.

    Raises:
        IndexError: names the first wrong one.
    """
    wrong = torch.nonzero((rows < -out_features) | (rows >= out_features))
    if wrong.numel():
        position = int(wrong[0])
        raise IndexError(
            f"claq::embedding: element {position} of indices is {int(rows[position])}, "
            f"expected {-out_features} to {out_features - 1}"
        )


def _layer(
    tensors: Sequence[torch.Tensor], in_features: int, out_features: int, columns: Sequence[int]
) -> QuantizedLinear:
    return QuantizedLinear(
        in_features=in_features,
        out_features=out_features,
        columns=(columns[0], columns[1], columns[2]),
        **dict(zip(TENSOR_NAMES, tensors, strict=True)),
    )
