"""Plain torch reference of ``claq::linear``: dequantize the layer, then a dense linear in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from claq_export.format.layer import TENSOR_NAMES, QuantizedLinear


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
    layer = QuantizedLinear(
        in_features=in_features,
        out_features=out_features,
        columns=(columns[0], columns[1], columns[2]),
        **dict(zip(TENSOR_NAMES, tensors[:-1], strict=True)),
    )
    bias = tensors[-1].to(torch.float32) if tensors[-1].numel() else None
    y = torch.nn.functional.linear(x.reshape(-1, in_features).to(torch.float32), layer.dequantize(), bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)
