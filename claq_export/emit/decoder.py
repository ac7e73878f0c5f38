"""Decoder operators in the file: ``claq::rms_norm`` and its kin become the ONNX operators of opset 23.

Attention in float32 becomes ``com.claq::ClaqCachedAttention``, whose function is the ONNX operator, to a cache in float16 between
casts: claq-runtime has a kernel for the CPU. In 16 bits, which is for GPUs, it is the ONNX operator itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import values

from claq_export.kernels import decoder_ops

from .function import CACHED_ATTENTION, DOMAIN

OPSET = 23
"""First version of the default ONNX domain with these operators."""

_DOMAIN = "claq.decoder"
"""Stands for the default domain while the graph is translated: the exporter works at a lower opset."""

_FLOAT, _INT = onnx.defs.OpSchema.AttrType.FLOAT, onnx.defs.OpSchema.AttrType.INT


_PAST = 4  # input of attention
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]


def _operator(
    name: str, inputs: str, outputs: str, domain: str = _DOMAIN, **attributes: onnx.defs.OpSchema.AttrType
) -> values.Op:
    """An operator whose inputs and outputs have these types, a letter each."""
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    schema = onnx.defs.OpSchema(
        name,
        domain,
        1,
        inputs=[parameter(f"input_{index}", kind) for index, kind in enumerate(inputs)],
        outputs=[parameter(f"output_{index}", kind) for index, kind in enumerate(outputs)],
        type_constraints=[(kind, _FLOATS, "") for kind in sorted({*inputs, *outputs})],
        attributes=[attribute(key, kind, required=True) for key, kind in attributes.items()],
    )
    return values.Op(values.Opset(domain, 1), name, schema)


_rms_norm = _operator("RMSNormalization", "TT", "T", axis=_INT, epsilon=_FLOAT)
_rotary = _operator("RotaryEmbedding", "TTT", "T", num_heads=_INT, rotary_embedding_dim=_INT)
_attention, _claq_attention = (
    _operator(name, "TTTTCC", "TCC", domain, q_num_heads=_INT, kv_num_heads=_INT, scale=_FLOAT)
    for name, domain in (("Attention", _DOMAIN), (CACHED_ATTENTION, DOMAIN))
)


def _translate_rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    return _rms_norm(x, weight, axis=-1, epsilon=epsilon)


def _translate_rotary(x: Any, cos: Any, sin: Any, num_heads: int) -> Any:
    rotated = 2 * int(cos.shape[-1])
    head = int(x.shape[-1]) // num_heads
    return _rotary(x, cos, sin, num_heads=num_heads, rotary_embedding_dim=rotated if rotated < head else 0)


def _translate_attention(*arguments: Any) -> Any:
    query, key, value, mask, past_key, past_value, num_heads, kv_heads, scale = arguments
    attention = _claq_attention if query.dtype == ir.DataType.FLOAT else _attention
    return attention(
        query, key, value, mask, past_key, past_value, q_num_heads=num_heads, kv_num_heads=kv_heads, scale=scale
    )


def decoder_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """``custom_translation_table`` of the decoder operators."""
    return {
        decoder_ops.rms_norm: _translate_rms_norm,
        decoder_ops.rotary: _translate_rotary,
        decoder_ops.cached_attention: _translate_attention,
    }


def has_narrow_cache(model: ir.Model) -> bool:
    """Whether attention reads a cache of another type than the query's."""
    return any(
        node.op_type == CACHED_ATTENTION and node.inputs[_PAST].dtype != node.inputs[0].dtype  # type: ignore[union-attr]
        for node in model.graph
    )


def settle_decoder(model: ir.Model) -> bool:
    """Move translated decoder operators to the default domain, whose version becomes 23; False if there are none.

    The other operators are those of opset 18, whose meaning in opset 23 is the same.
    """
    found = False
    for node in model.graph:
        if node.domain == _DOMAIN:
            node.domain = ""
            node.version = None
            found = True
        found = found or node.op_type == CACHED_ATTENTION  # its function is of that version
    model.opset_imports.pop(_DOMAIN, None)
    if found:
        model.opset_imports[""] = OPSET
    return found
