"""How ``torch.onnx.export`` writes claq's torch operators down: one ``com.claq`` node for each; those of decoders: decoder.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import values

from claq_export.format.layer import TENSOR_NAMES
from claq_export.kernels import decoder_ops, fused_ops, ops

from .function import ATTENTION, DOMAIN, VERSION

INPUTS = ("x", *TENSOR_NAMES, "bias")
"""Inputs of ``ClaqMatMul`` in order."""

GATHER_INPUTS = ("indices", *TENSOR_NAMES, "like")
"""Inputs of ``ClaqGather`` in order; ``like`` has length zero and the dtype of the result."""

GATHER_ATTRIBUTES = ("in_features", "out_features", "columns_4", "columns_3", "columns_2")
"""Integer attributes of ``ClaqGather``."""

ATTRIBUTES = (*GATHER_ATTRIBUTES, "accuracy_level")
"""Integer attributes of ``ClaqMatMul``."""

ADD_INPUTS = (*INPUTS, "residual")
"""Inputs of ``ClaqMatMulAdd`` in order."""

NORM_INPUTS = (*ADD_INPUTS, "norm_weight")
"""Inputs of ``ClaqMatMulAddNorm`` in order; it has the attributes of ``ClaqMatMul`` and the float ``epsilon``."""

ATTENTION_INPUTS = ("query", "key", "value", "mask")
"""Inputs of ``ClaqAttention`` in order; it has the attributes ``num_heads`` and ``scale``."""

ROTARY_INPUTS = (*INPUTS, "cos", "sin")
"""Inputs of ``ClaqMatMulRotary`` in order."""

SPLIT_ATTRIBUTES = (*ATTRIBUTES, "split_0", "split_1", "split_2")
"""Integer attributes of ``ClaqMatMulSplit``."""

ROTARY_ATTRIBUTES = (*SPLIT_ATTRIBUTES, "heads_0", "heads_1", "rotary_dim")
"""Integer attributes of ``ClaqMatMulRotary``."""


def _schema(name: str, inputs: Sequence[str], attributes: Sequence[str], outputs: int) -> onnx.defs.OpSchema:
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    types = {
        "x": "T",
        "residual": "T",
        "norm_weight": "T",
        "cos": "T",
        "sin": "T",
        **dict.fromkeys(ATTENTION_INPUTS, "T"),
        "bias": "B",
        "indices": "S",
        "like": "T",
        "codes": "tensor(uint32)",
        "codebook": "tensor(int8)",
        "outlier_ptr": "tensor(int32)",
        "order": "I",
        "outlier_index": "J",
    }
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    indices = ["tensor(uint16)", "tensor(int32)"]
    constraints = [
        ("T", floats, "dtype of the result"),
        ("B", floats, "dtype of the bias"),
        ("S", ["tensor(int32)", "tensor(int64)"], "dtype of the indices"),
        ("I", indices, "dtype of order"),
        ("J", indices, "dtype of outlier_index"),
    ]
    used = {types.get(name) for name in inputs}
    kind = onnx.defs.OpSchema.AttrType
    kinds = {"epsilon": kind.FLOAT, "scale": kind.FLOAT}
    return onnx.defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[parameter(name, types.get(name, "tensor(float16)")) for name in inputs],
        outputs=[parameter(f"y_{index}" if outputs > 1 else "y", "T") for index in range(outputs)],
        type_constraints=[constraint for constraint in constraints if constraint[0] in used],
        attributes=[attribute(name, kinds.get(name, kind.INT), required=True) for name in attributes],
    )


def _operator(name: str, inputs: Sequence[str], attributes: Sequence[str], outputs: int = 1) -> values.Op:
    return values.Op(values.Opset(DOMAIN, VERSION), name, _schema(name, inputs, attributes, outputs))


_claq_matmul = _operator("ClaqMatMul", INPUTS, ATTRIBUTES)
_claq_matmul_add = _operator("ClaqMatMulAdd", ADD_INPUTS, ATTRIBUTES)
_claq_matmul_add_norm = _operator("ClaqMatMulAddNorm", NORM_INPUTS, (*ATTRIBUTES, "epsilon"), outputs=2)
_claq_matmul_swiglu = _operator("ClaqMatMulSwiGLU", INPUTS, ATTRIBUTES)
_claq_matmul_split = _operator("ClaqMatMulSplit", INPUTS, SPLIT_ATTRIBUTES, outputs=3)
_claq_matmul_rotary = _operator("ClaqMatMulRotary", ROTARY_INPUTS, ROTARY_ATTRIBUTES, outputs=3)
_claq_attention = _operator(ATTENTION, ATTENTION_INPUTS, ("num_heads", "scale"))
_claq_gather = _operator("ClaqGather", GATHER_INPUTS, GATHER_ATTRIBUTES)


def _layer_attributes(
    in_features: int, out_features: int, columns: Sequence[int], accuracy_level: int
) -> dict[str, int]:
    return {
        "in_features": in_features,
        "out_features": out_features,
        **{f"columns_{width}": count for width, count in zip((4, 3, 2), columns, strict=True)},
        "accuracy_level": accuracy_level,
    }


def _translate_linear(*arguments: Any) -> Any:
    """Record one ``ClaqMatMul`` node; arguments as in the schema of ``claq::linear``."""
    return _claq_matmul(*arguments[: len(INPUTS)], **_layer_attributes(*arguments[len(INPUTS) :]))


def _translate_linear_add(*arguments: Any) -> Any:
    *layer, residual = arguments
    return _claq_matmul_add(*layer[: len(INPUTS)], residual, **_layer_attributes(*layer[len(INPUTS) :]))


def _translate_linear_add_norm(*arguments: Any) -> Any:
    *layer, residual, weight, epsilon = arguments
    attributes = _layer_attributes(*layer[len(INPUTS) :])
    return _claq_matmul_add_norm(*layer[: len(INPUTS)], residual, weight, **attributes, epsilon=epsilon)


def _translate_linear_swiglu(*arguments: Any) -> Any:
    return _claq_matmul_swiglu(*arguments[: len(INPUTS)], **_layer_attributes(*arguments[len(INPUTS) :]))


def _translate_linear_split(*arguments: Any) -> Any:
    *layer, parts = arguments
    sizes = {f"split_{index}": size for index, size in enumerate(parts)}
    return _claq_matmul_split(*layer[: len(INPUTS)], **_layer_attributes(*layer[len(INPUTS) :]), **sizes)


def _translate_linear_rotary(*arguments: Any) -> Any:
    *layer, parts, cos, sin, heads, kv_heads = arguments
    sizes = {f"split_{index}": size for index, size in enumerate(parts)}
    rotated = 2 * int(cos.shape[-1])
    return _claq_matmul_rotary(
        *layer[: len(INPUTS)],
        cos,
        sin,
        **_layer_attributes(*layer[len(INPUTS) :]),
        **sizes,
        heads_0=heads,
        heads_1=kv_heads,
        rotary_dim=rotated if rotated < parts[0] // heads else 0,
    )


def _translate_embedding(*arguments: Any) -> Any:
    """Record one ``ClaqGather`` node; arguments as in the schema of ``claq::embedding``."""
    tensors = arguments[: len(GATHER_INPUTS)]
    in_features, out_features, columns = arguments[len(GATHER_INPUTS) :]
    counts: Sequence[int] = columns
    return _claq_gather(
        *tensors,
        in_features=in_features,
        out_features=out_features,
        columns_4=counts[0],
        columns_3=counts[1],
        columns_2=counts[2],
    )


def _translate_attention(query: Any, key: Any, value: Any, mask: Any, num_heads: int, scale: float) -> Any:
    if mask is None:
        mask = ir.tensor(np.zeros(1, np.float32))
    return _claq_attention(query, key, value, mask, num_heads=num_heads, scale=scale)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """``custom_translation_table`` for ``torch.onnx.export``: claq's operators and their translations."""
    return {
        ops.linear: _translate_linear,
        ops.embedding: _translate_embedding,
        decoder_ops.attention: _translate_attention,
        fused_ops.linear_add: _translate_linear_add,
        fused_ops.linear_add_norm: _translate_linear_add_norm,
        fused_ops.linear_swiglu: _translate_linear_swiglu,
        fused_ops.linear_rotary: _translate_linear_rotary,
        fused_ops.linear_split: _translate_linear_split,
    }
