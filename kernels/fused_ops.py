"""Torch operators of a quantized linear together with what a decoder does to its result: split, gate, add, normalize.

A pass puts them into the graph of a file; the emitter writes each as one ONNX node, so that ONNX Runtime runs one operator
instead of two to five. In PyTorch each is ``claq::linear`` and the plain operators behind it, on every device.
"""

from __future__ import annotations

from typing import Any

import torch

from . import decoder_ops, ops

_LAYER = (
    "Tensor x, Tensor codes, Tensor codebook, Tensor scale, Tensor row_scale, Tensor order, "
    "Tensor outlier_ptr, Tensor outlier_index, Tensor outlier_value, Tensor bias, "
    "int in_features, int out_features, int[] columns, int accuracy_level"
)

_library = torch.library.Library("claq", "FRAGMENT")
_library.define(f"linear_add({_LAYER}, Tensor residual) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"linear_add_norm({_LAYER}, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(f"linear_swiglu({_LAYER}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"linear_split({_LAYER}, int[] parts) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"linear_rotary({_LAYER}, int[] parts, Tensor cos, Tensor sin, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _add(*arguments: Any) -> torch.Tensor:
    *layer, residual = arguments
    return ops.linear(*layer) + residual


def _add_norm(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *layer, weight, epsilon = arguments
    total = _add(*layer)
    return total, decoder_ops.rms_norm(total, weight, epsilon)


def _swiglu(*arguments: Any) -> torch.Tensor:
    gate, up = ops.linear(*arguments).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _split(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *layer, parts = arguments
    # An operator's results must not share memory.
    return tuple(part.clone() for part in ops.linear(*layer).split(parts, -1))


def _rotary(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *layer, cos, sin, heads, kv_heads = arguments
    first, second, third = _split(*layer)
    return decoder_ops.rotary(first, cos, sin, heads), decoder_ops.rotary(second, cos, sin, kv_heads), third


_library.impl("linear_add", _add, "CompositeExplicitAutograd")
_library.impl("linear_add_norm", _add_norm, "CompositeExplicitAutograd")
_library.impl("linear_swiglu", _swiglu, "CompositeExplicitAutograd")
_library.impl("linear_rotary", _rotary, "CompositeExplicitAutograd")
_library.impl("linear_split", _split, "CompositeExplicitAutograd")
# Their bodies run on fake tensors as they are.
torch.library.register_fake("claq::linear_add", _add, lib=_library)
torch.library.register_fake("claq::linear_add_norm", _add_norm, lib=_library)
torch.library.register_fake("claq::linear_swiglu", _swiglu, lib=_library)
torch.library.register_fake("claq::linear_rotary", _rotary, lib=_library)
torch.library.register_fake("claq::linear_split", _split, lib=_library)

linear_add = torch.ops.claq.linear_add.default
"""``claq::linear`` plus ``residual``, which has the shape and dtype of the result."""

linear_add_norm = torch.ops.claq.linear_add_norm.default
"""``claq::linear_add`` and the RMS normalization of its result (``claq::rms_norm`` with ``weight`` and ``epsilon``)."""

linear_swiglu = torch.ops.claq.linear_swiglu.default
"""``silu(gate) * up`` of ``claq::linear``, whose result is ``gate`` and ``up`` side by side: ``[..., out_features / 2]``."""

linear_split = torch.ops.claq.linear_split.default
"""``claq::linear`` split at its last axis into three ``parts``, of which the last may be empty."""

linear_rotary = torch.ops.claq.linear_rotary.default
"""``claq::linear_split`` whose first two parts get rotary positions (``claq::rotary`` with ``heads`` and ``kv_heads``)."""

LAYER_OPERATORS = (ops.linear, ops.embedding, linear_add, linear_add_norm, linear_swiglu, linear_split, linear_rotary)
"""Operators whose arguments 1 to 8 are the tensors of a quantized layer."""
