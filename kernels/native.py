"""Hosts libclaq's C interface on torch tensors: the fast CPU kernels of ``claq::linear`` and ``claq::embedding``.

No extension is compiled against torch. The library comes with the distribution ``claq-runtime``; without it
:func:`native_available` says why and nothing else of this module may be used.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from claq_export.errors import FormatError
from claq_export.format.layer import TENSOR_NAMES
from claq_export.libclaq import load_libclaq
from claq_export.threads import threads_for

LAYER_TENSORS = (*TENSOR_NAMES, "bias")

DTYPES = {
    torch.float32: 1,
    torch.int8: 3,
    torch.uint16: 4,
    torch.int32: 6,
    torch.int64: 7,
    torch.float16: 10,
    torch.uint32: 12,
    torch.bfloat16: 16,
}
"""The numbers of ``claq_dtype`` in claq.h, which are ONNX's."""

_ACTIVATION_DTYPES = {dtype: DTYPES[dtype] for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_ERROR_SIZE = 512
_thread = threading.local()


class _Tensor(ctypes.Structure):
    """``claq_tensor`` of claq.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class LayerDesc(ctypes.Structure):
    """``claq_layer_desc`` of claq.h."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("columns_4", ctypes.c_int64),
        ("columns_3", ctypes.c_int64),
        ("columns_2", ctypes.c_int64),
        *((name, _Tensor) for name in LAYER_TENSORS),
        ("kernel", ctypes.c_char_p),
    )


def describe_layer(
    tensors: Sequence[torch.Tensor],
    columns: Sequence[int],
    in_features: int,
    out_features: int,
    kernel: str | None = None,
) -> LayerDesc:
    """A layer as libclaq's C interface takes it.

    Args:
        tensors: contiguous, in the order of :data:`LAYER_TENSORS`, on the CPU or a GPU; the descriptor points into them.
        columns: stored columns of 4, 3 and 2 bits.
        in_features, out_features: K and N.
        kernel: name of a CPU kernel family, or None for the best one.
    """
    desc = LayerDesc(
        struct_size=ctypes.sizeof(LayerDesc),
        in_features=in_features,
        out_features=out_features,
        columns_4=columns[0],
        columns_3=columns[1],
        columns_2=columns[2],
        kernel=kernel.encode() if kernel else None,
    )
    for name, tensor in zip(LAYER_TENSORS, tensors, strict=True):
        shape = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
        setattr(desc, name, _Tensor(tensor.data_ptr(), shape, tensor.dim(), DTYPES.get(tensor.dtype, 0)))
    return desc


@cache
def _load() -> tuple[Any, str]:
    """The library and an empty string, or None and the reason why there is none."""
    library, reason = load_libclaq()
    if library is None:
        return None, reason
    library.claq_create.restype = ctypes.c_int
    library.claq_create.argtypes = [
        ctypes.POINTER(LayerDesc),
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    library.claq_run.restype = ctypes.c_int
    library.claq_run.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    library.claq_gather.restype = ctypes.c_int
    library.claq_gather.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    library.claq_destroy.restype = None
    library.claq_destroy.argtypes = [ctypes.c_void_p]
    library.claq_layer_kernel.restype = ctypes.c_char_p
    library.claq_layer_kernel.argtypes = [ctypes.c_void_p]
    return library, ""


def native_available() -> tuple[bool, str]:
    """Whether libclaq can be used, and if not the reason."""
    library, reason = _load()
    return library is not None, reason


def _error_buffer() -> Any:
    """The calling thread's buffer for the library's messages."""
    try:
        return _thread.error
    except AttributeError:
        _thread.error = ctypes.create_string_buffer(_ERROR_SIZE)
        return _thread.error


class NativeLinear:
    """One layer on libclaq: checked once when made, then called with activations.

    The tensors are those of ``docs/format.md``, on the CPU. Contiguous ones are read in place and kept alive by this
    object; they must not be changed afterwards.

    Args:
        codes, codebook, scale, row_scale, order, outlier_ptr, outlier_index, outlier_value, bias: the layer's tensors.
        columns: stored columns of 4, 3 and 2 bits.
        in_features, out_features: K and N.
        kernel: name of a kernel family (``claq_runtime.kernels()``), or None for the best one here.

    Raises:
        RuntimeError: libclaq is not available, or the family is unknown.
        FormatError: a tensor does not hold to the format; the message names it.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        codebook: torch.Tensor,
        scale: torch.Tensor,
        row_scale: torch.Tensor,
        order: torch.Tensor,
        outlier_ptr: torch.Tensor,
        outlier_index: torch.Tensor,
        outlier_value: torch.Tensor,
        bias: torch.Tensor,
        *,
        columns: Sequence[int],
        in_features: int,
        out_features: int,
        kernel: str | None = None,
    ) -> None:
        self._handle = ctypes.c_void_p()
        self._library, reason = _load()
        if self._library is None:
            raise RuntimeError(f"the native kernel cannot be used: {reason}")
        self._run = self._library.claq_run
        self.in_features = in_features
        self.out_features = out_features
        given = (codes, codebook, scale, row_scale, order, outlier_ptr, outlier_index, outlier_value, bias)
        self._tensors = tuple(tensor.detach().contiguous() for tensor in given)
        for name, tensor in zip(LAYER_TENSORS, self._tensors, strict=True):
            if tensor.device.type != "cpu":
                raise FormatError(f"{name}: is on {tensor.device}, expected a CPU tensor")
        desc = describe_layer(self._tensors, columns, in_features, out_features, kernel)
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        status = self._library.claq_create(ctypes.byref(desc), ctypes.byref(self._handle), error, _ERROR_SIZE)
        if status == 1:
            raise FormatError(error.value.decode())
        if status:
            raise RuntimeError(error.value.decode())

    @property
    def kernel(self) -> str:
        """Name of the kernel family in use."""
        name: bytes = self._library.claq_layer_kernel(self._handle)
        return name.decode()

    def __call__(self, x: torch.Tensor, accuracy_level: int = 0) -> torch.Tensor:
        """``y[..., out_features]`` of ``x[..., in_features]``, in x's dtype (float32, float16 or bfloat16).

        Args:
            x: CPU activations.
            accuracy_level: 0 or 1 for float32 arithmetic, 4 for activations rounded to int8.

        Raises:
            ValueError: x is of another dtype, device or last dimension.
            RuntimeError: the library refused the call.
        """
        dtype = _ACTIVATION_DTYPES.get(x.dtype)
        if dtype is None or not x.is_cpu:
            raise ValueError(f"x: is {x.dtype} on {x.device}, expected float32, float16 or bfloat16 on the CPU")
        shape = x.shape
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"x: shape is {list(shape)}, expected the last dimension to be {self.in_features}")
        # A decoder's step makes hundreds of calls on single vectors: what can be prepared once is.
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*shape[:-1], self.out_features), dtype=x.dtype)
        parallel_for, context = threads_for(self._library)
        error = _error_buffer()
        status = self._run(
            self._handle,
            dtype,
            accuracy_level,
            x.data_ptr(),
            x.numel() // self.in_features,
            y.data_ptr(),
            parallel_for,
            context,
            error,
            _ERROR_SIZE,
        )
        if status:
            raise RuntimeError(f"claq_run: {error.value.decode()}")
        return y

    def gather(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows of the weight: ``[*indices.shape, in_features]`` in ``dtype`` (float32, float16 or bfloat16).

        Args:
            indices: int32 or int64 on the CPU; below zero counts from the end.
            dtype: of the result.

        Raises:
            ValueError: indices or result are of another dtype or device.
            IndexError: an index is out of range; the message names it.
            RuntimeError: the library failed.
        """
        if indices.device.type != "cpu" or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"indices: are {indices.dtype} on {indices.device}, expected int32 or int64 on the CPU")
        if dtype not in _ACTIVATION_DTYPES:
            raise ValueError(f"result: is {dtype}, expected float32, float16 or bfloat16")
        indices = indices.detach().contiguous()
        y = torch.empty((*indices.shape, self.in_features), dtype=dtype)
        parallel_for, context = threads_for(self._library)
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        status = self._library.claq_gather(
            self._handle,
            DTYPES[indices.dtype],
            indices.data_ptr(),
            indices.numel(),
            DTYPES[dtype],
            y.data_ptr(),
            parallel_for,
            context,
            error,
            _ERROR_SIZE,
        )
        if status == 2:
            raise IndexError(f"claq::embedding: {error.value.decode()}")
        if status:
            raise RuntimeError(f"claq_gather: {error.value.decode()}")
        return y

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.claq_destroy(self._handle)
