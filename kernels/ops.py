"""The torch operator ``claq::linear``: its schema, its fake (shape) kernel, and which kernel serves which device.

One node of this operator stands for one quantized layer of ``docs/format.md`` wherever PyTorch keeps a graph
(``torch.export``, ``torch.compile``, FX passes). The reference kernel (:mod:`.reference`) runs on every device and is
the oracle of all others; on CPU the native library takes its place where it is installed (:mod:`.cpu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .cpu import cpu_linear
from .reference import reference_linear

OPERATOR = "claq::linear"
"""Qualified name of the operator; ``torch.ops.claq.linear.default`` once this module is imported."""

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of ``x`` the operator takes."""

_SCHEMA = (
    "linear(Tensor x, Tensor codes, Tensor codebook, Tensor scale, Tensor row_scale, Tensor order, "
    "Tensor outlier_ptr, Tensor outlier_index, Tensor outlier_value, Tensor bias, "
    "int in_features, int out_features, int[] columns, int accuracy_level) -> Tensor"
)

_library = torch.library.Library("claq", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _check_arguments(
    x: torch.Tensor, bias: torch.Tensor, in_features: int, out_features: int, columns: Sequence[int]
) -> None:
    torch._check(x.dim() >= 1, lambda: "claq::linear: x must have at least one dimension")
    torch._check(
        x.dtype in ACTIVATION_DTYPES, lambda: f"claq::linear: x must be float32, float16 or bfloat16, got {x.dtype}"
    )
    torch._check(
        x.shape[-1] == in_features,
        lambda: f"claq::linear: the last dimension of x must be in_features = {in_features}, got {x.shape[-1]}",
    )
    torch._check(
        bias.numel() in (0, out_features),
        lambda: f"claq::linear: bias must have out_features = {out_features} values or none, got {bias.numel()}",
    )
    torch._check(len(columns) == 3, lambda: f"claq::linear: columns must be three counts, got {len(columns)}")


def _reference(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, in_features, out_features, columns, _accuracy_level = rest
    _check_arguments(x, tensors[-1], in_features, out_features, columns)
    return reference_linear(x, tensors, in_features, out_features, columns)


def _cpu(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, in_features, out_features, columns, accuracy_level = rest
    _check_arguments(x, tensors[-1], in_features, out_features, columns)
    return cpu_linear(x, tensors, in_features, out_features, columns, accuracy_level)


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, in_features, out_features, columns, _accuracy_level = rest
    _check_arguments(x, tensors[-1], in_features, out_features, columns)
    return x.new_empty((*x.shape[:-1], out_features))


def _backward(_ctx: Any, *_gradients: torch.Tensor) -> None:
    raise RuntimeError(
        "claq::linear is for inference and has no gradient: run the quantized model under torch.no_grad() "
        "or torch.inference_mode(), or train the unquantized model and quantize it again"
    )


_library.impl("linear", _reference, "CompositeExplicitAutograd")
_library.impl("linear", _cpu, "CPU")
torch.library.register_fake(OPERATOR, _fake, lib=_library)
torch.library.register_autograd(OPERATOR, _backward, lib=_library)

linear = torch.ops.claq.linear.default
"""The operator. Arguments as in the schema; tensors as in ``docs/format.md``, absent parts of length zero.

``x[..., in_features]`` is float32, float16 or bfloat16; the result ``[..., out_features]`` has its dtype. ``columns``
are the stored columns of width 4, 3 and 2; ``accuracy_level`` is the arithmetic of the native kernels. There is no
gradient.
"""
