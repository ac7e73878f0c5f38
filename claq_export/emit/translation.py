"""How ``torch.onnx.export`` writes claq's torch operators down: one ``com.claq`` node for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
from onnxscript import values

from claq_export.format.layer import TENSOR_NAMES
from claq_export.kernels import ops

from .function import DOMAIN, VERSION

INPUTS = ("x", *TENSOR_NAMES, "bias")
"""Inputs of ``ClaqMatMul`` in order."""

ATTRIBUTES = ("in_features", "out_features", "columns_4", "columns_3", "columns_2", "accuracy_level")
"""Integer attributes of ``ClaqMatMul``."""


def _schema() -> onnx.defs.OpSchema:
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    types = {
        "x": "T",
        "bias": "B",
        "codes": "tensor(uint32)",
        "codebook": "tensor(int8)",
        "outlier_ptr": "tensor(int32)",
        "order": "I",
        "outlier_index": "J",
    }
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    indices = ["tensor(uint16)", "tensor(int32)"]
    return onnx.defs.OpSchema(
        "ClaqMatMul",
        DOMAIN,
        VERSION,
        inputs=[parameter(name, types.get(name, "tensor(float16)")) for name in INPUTS],
        outputs=[parameter("y", "T")],
        type_constraints=[
            ("T", floats, "dtype of the activations"),
            ("B", floats, "dtype of the bias"),
            ("I", indices, "dtype of order"),
            ("J", indices, "dtype of outlier_index"),
        ],
        attributes=[attribute(name, onnx.defs.OpSchema.AttrType.INT, required=True) for name in ATTRIBUTES],
    )


_claq_matmul = values.Op(values.Opset(DOMAIN, VERSION), "ClaqMatMul", _schema())


def _translate_linear(*arguments: Any) -> Any:
    """Record one ``ClaqMatMul`` node; arguments as in the schema of ``claq::linear``."""
    tensors = arguments[: len(INPUTS)]
    in_features, out_features, columns, accuracy_level = arguments[len(INPUTS) :]
    counts: Sequence[int] = columns
    return _claq_matmul(
        *tensors,
        in_features=in_features,
        out_features=out_features,
        columns_4=counts[0],
        columns_3=counts[1],
        columns_2=counts[2],
        accuracy_level=accuracy_level,
    )


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """``custom_translation_table`` for ``torch.onnx.export``: claq's operators and their translations."""
    return {ops.linear: _translate_linear}
