"""GELU and attention in the file: written so that ONNX Runtime runs few operators for them.

The exporter's own translations are equal in value, but not in a form that ONNX Runtime's fusions know, or with operators that
change nothing. In a small encoder with many sentences these took a third of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops import nn


def _translate_gelu(x: Any, approximate: str = "none") -> Any:
    """``aten.gelu``; the order of the products is what ``GeluFusion`` and ``FastGeluFusion`` look for. Halves and ones are
    exact, so with the error function the value is that of PyTorch's formula in the order of the exporter."""
    if approximate == "tanh":
        # x + 0.044715 x^3 as x (1 + 0.044715 x^2): the other form's fusion stopped at Pow of opset 13.
        square = op.Mul(op.Mul(x, _constant(0.044715, x)), x)
        inner = op.Mul(op.Mul(x, _constant(math.sqrt(2 / math.pi), x)), op.Add(square, _constant(1, x)))
        raised = op.Add(op.Tanh(inner), _constant(1, x))
    else:
        raised = op.Add(op.Erf(op.Div(x, _constant(math.sqrt(2), x))), _constant(1, x))
    return op.Mul(op.Mul(x, _constant(0.5, x)), raised)


def _translate_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``aten.scaled_dot_product_attention``. The exporter turns keys in three dimensions, which keeps ONNX Runtime from
    joining that with the transposition before it, and looks for NaNs in every weight, though a mask of finite numbers
    (``AdditiveMasks`` makes such of boolean ones) makes none.
    """
    width = query.shape[-1]
    if scale is not None and scale < 0:
        query, scale = op.Neg(query), -scale  # which has a root
    bool_mask = attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL
    if is_causal or dropout_p or enable_gqa or bool_mask or not isinstance(width, int):
        return nn.aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    # Each side by the root, as PyTorch does: in float16 the product alone may overflow.
    root = _constant(math.sqrt(1 / math.sqrt(width) if scale is None else scale), query)
    scores = op.MatMul(op.Mul(query, root), op.Mul(op.Transpose(key, perm=[0, 1, 3, 2]), root))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _constant(value: float, like: Any) -> Any:
    return ir.tensor(value, dtype=like.dtype)


def fused_forms() -> dict[Callable[..., Any], Callable[..., Any]]:
    """``custom_translation_table`` of operators that have a form of their own."""
    return {
        torch.ops.aten.gelu.default: _translate_gelu,
        torch.ops.aten.scaled_dot_product_attention.default: _translate_attention,
    }
