"""Plain torch reference of ``claq::linear``: dequantize the layer, then a dense linear in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from claq_export.format.layer import QuantizedLinear


def reference_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor,
    order: torch.Tensor,
    outlier_ptr: torch.Tensor,
    outlier_index: torch.Tensor,
    outlier_value: torch.Tensor,
    bias: torch.Tensor,
    in_features: int,
    out_features: int,
    columns: Sequence[int],
) -> torch.Tensor:
    """``y = x Wᵀ + b`` with the weight of ``docs/format.md``, computed in float32 on the tensors' device.

    Args:
        x: ``[..., in_features]`` of any floating dtype.
        codes, codebook, scale, row_scale, order, outlier_ptr, outlier_index, outlier_value: the layer's tensors,
            trusted (see :meth:`claq_export.format.layer.QuantizedLinear.validate`); absent parts have length zero.
        bias: ``[out_features]`` or empty.
        columns: stored columns of width 4, 3 and 2.

    Returns:
        ``[..., out_features]``, contiguous, in the dtype of ``x``.
    """
    layer = QuantizedLinear(
        in_features=in_features,
        out_features=out_features,
        columns=(columns[0], columns[1], columns[2]),
        codes=codes,
        codebook=codebook,
        scale=scale,
        row_scale=row_scale,
        order=order,
        outlier_ptr=outlier_ptr,
        outlier_index=outlier_index,
        outlier_value=outlier_value,
    )
    rows = x.reshape(-1, in_features).to(torch.float32)
    y = torch.nn.functional.linear(rows, layer.dequantize(), bias.to(torch.float32) if bias.numel() else None)
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)
