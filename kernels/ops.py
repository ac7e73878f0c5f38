"""The torch operators ``claq::linear`` and ``claq::embedding``: schemas, fake (shape) kernels, and which kernel serves
which device.

One node stands for one use of a quantized layer of ``docs/format.md`` wherever PyTorch keeps a graph (``torch.export``,
``torch.compile``, FX passes). The reference kernels (:mod:`.reference`) run on every device and are the oracles of all
others; on CPU the native library takes their place where it is installed (:mod:`.cpu`), on CUDA Triton's kernels do
(:mod:`.cuda`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from .cpu import cpu_embedding, cpu_linear
from .cuda import cuda_embedding, cuda_linear
from .reference import reference_embedding, reference_linear

OPERATOR = "claq::linear"
"""Qualified name of the operator; ``torch.ops.claq.linear.default`` once this module is imported."""

EMBEDDING_OPERATOR = "claq::embedding"
"""Qualified name; ``torch.ops.claq.embedding.default`` once this module is imported."""

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of activations: of ``x``, and of the rows of an embedding."""

_SCHEMA = (
    "linear(Tensor x, Tensor codes, Tensor codebook, Tensor scale, Tensor row_scale, Tensor order, "
    "Tensor outlier_ptr, Tensor outlier_index, Tensor outlier_value, Tensor bias, "
    "int in_features, int out_features, int[] columns, int accuracy_level) -> Tensor"
)

_EMBEDDING_SCHEMA = (
    "embedding(Tensor indices, Tensor codes, Tensor codebook, Tensor scale, Tensor row_scale, Tensor order, "
    "Tensor outlier_ptr, Tensor outlier_index, Tensor outlier_value, Tensor like, "
    "int in_features, int out_features, int[] columns) -> Tensor"
)

_library = torch.library.Library("claq", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.define(_EMBEDDING_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


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
    shape = x.shape
    # The checks with their messages take longer than the product of a small layer.
    if not (
        shape
        and shape[-1] == in_features
        and x.dtype in ACTIVATION_DTYPES
        and tensors[-1].numel() in (0, out_features)
        and len(columns) == 3
    ):
        _check_arguments(x, tensors[-1], in_features, out_features, columns)
    return cpu_linear(x, tensors, in_features, out_features, columns, accuracy_level)


def _cuda(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, in_features, out_features, columns, accuracy_level = rest
    _check_arguments(x, tensors[-1], in_features, out_features, columns)
    return cuda_linear(x, tensors, in_features, out_features, columns, accuracy_level)


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, in_features, out_features, columns, _accuracy_level = rest
    _check_arguments(x, tensors[-1], in_features, out_features, columns)
    return x.new_empty((*x.shape[:-1], out_features))


def _check_lookup(indices: torch.Tensor, like: torch.Tensor, columns: Sequence[int]) -> None:
    torch._check(
        indices.dtype in (torch.int32, torch.int64),
        lambda: f"claq::embedding: indices must be int32 or int64, got {indices.dtype}",
    )
    torch._check(
        like.dtype in ACTIVATION_DTYPES and like.numel() == 0,
        lambda: (
            "claq::embedding: like must be of length zero and float32, float16 or bfloat16, "
            f"got {like.dtype} of length {like.numel()}"
        ),
    )
    torch._check(len(columns) == 3, lambda: f"claq::embedding: columns must be three counts, got {len(columns)}")


def _reference_embedding(indices: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, like, in_features, out_features, columns = rest
    _check_lookup(indices, like, columns)
    return reference_embedding(indices, tensors, in_features, out_features, columns, like.dtype)


def _cpu_embedding(indices: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, like, in_features, out_features, columns = rest
    _check_lookup(indices, like, columns)
    return cpu_embedding(indices, tensors, in_features, out_features, columns, like)


def _cuda_embedding(indices: torch.Tensor, *rest: Any) -> torch.Tensor:
    *tensors, like, in_features, out_features, columns = rest
    _check_lookup(indices, like, columns)
    return cuda_embedding(indices, tensors, in_features, out_features, columns, like.dtype)


def _fake_embedding(indices: torch.Tensor, *rest: Any) -> torch.Tensor:
    *_tensors, like, in_features, _out_features, columns = rest
    _check_lookup(indices, like, columns)
    return indices.new_empty((*indices.shape, in_features), dtype=like.dtype)


def _backward(_ctx: Any, *_gradients: torch.Tensor) -> None:
    raise RuntimeError(
        "claq's operators (claq::linear, claq::embedding) are for inference and have no gradient: run the quantized "
        "model under torch.no_grad() or torch.inference_mode(), or train the unquantized model and quantize it again"
    )


def register_autocast(library: torch.library.Library, name: str, operator: Callable[..., torch.Tensor]) -> None:
    """Have an operator take its first argument ``x`` as autocast has ``aten.linear`` take its own: in the dtype of
    autocast, unless it is of float64. (``torch.library.register_autocast`` knows one dtype for all times.)

    Args:
        library: the operator's.
        name: its name in the library.
        operator: what to call with the ``x`` of that dtype; the other arguments are passed on as they are, since who they
            are is what weights are looked up by.
    """

    def implement(device: str) -> None:
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

        def cast(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                lower = x.is_floating_point() and x.dtype != torch.float64
                return operator(x.to(torch.get_autocast_dtype(device)) if lower else x, *rest)

        library.impl(name, cast, key.name)

    implement("cpu")
    implement("cuda")


_library.impl("linear", _reference, "CompositeExplicitAutograd")
_library.impl("linear", _cpu, "CPU")
_library.impl("linear", _cuda, "CUDA")
torch.library.register_fake(OPERATOR, _fake, lib=_library)
torch.library.register_autograd(OPERATOR, _backward, lib=_library)
register_autocast(_library, "linear", torch.ops.claq.linear.default)
_library.impl("embedding", _reference_embedding, "CompositeExplicitAutograd")
_library.impl("embedding", _cpu_embedding, "CPU")
_library.impl("embedding", _cuda_embedding, "CUDA")
torch.library.register_fake(EMBEDDING_OPERATOR, _fake_embedding, lib=_library)
torch.library.register_autograd(EMBEDDING_OPERATOR, _backward, lib=_library)

linear = torch.ops.claq.linear.default
"""The operator. Arguments as in the schema; tensors as in ``docs/format.md``, absent parts of length zero.

``x[..., in_features]`` is float32, float16 or bfloat16; the result ``[..., out_features]`` has its dtype, and under
autocast that of autocast, as with ``aten.linear``. ``columns`` are the stored columns of width 4, 3 and 2;
``accuracy_level`` is the arithmetic of the native kernels. There is no gradient.
"""


def call_linear(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """:data:`linear` for modules that run eagerly: without PyTorch's dispatcher where only the CPU kernel is behind it.

    To pass fourteen arguments through the dispatcher and its key for gradients takes 20 µs, several times what the product of
    a small layer does, and a decoding step has hundreds of these.
    """
    return (_cpu if _reaches_cpu_kernel(x) else linear)(x, *rest)


def _reaches_cpu_kernel(x: torch.Tensor) -> bool:
    """Whether nothing that PyTorch puts between a call and the CPU kernel has anything to do: no tracing or compilation, no
    subclass, mode, transform or autocast, no gradient, no profile that should name the operator."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_neg()  # a view whose values are those of its memory with another sign
        and not x._is_zerotensor()  # zeros without memory
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not torch._C._autograd._profiler_enabled()
    )


embedding = torch.ops.claq.embedding.default
"""Rows of a layer's weight ``W[out_features, in_features]``, the vocabulary being its output features.

``indices`` is int32 or int64 of any shape, below zero counts from the end, and an index out of range is an
``IndexError`` (on CUDA, where to look would mean to wait, its row is NaN); the result ``[*indices.shape, in_features]``
has the dtype of ``like``, a tensor of length zero. Tensors as in ``docs/format.md``. There is no gradient.
"""
