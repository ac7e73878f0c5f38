"""Random layers in the claq format, their dense weights, and ONNX models and C handles around them.

The packing here follows docs/format.md and shares no code with the package, so that it can serve as an oracle.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import claq_runtime

NAMES = (
    "codes",
    "codebook",
    "scale",
    "row_scale",
    "order",
    "outlier_ptr",
    "outlier_index",
    "outlier_value",
    "bias",
)
DTYPES = {
    np.dtype(np.float32): 1,
    np.dtype(np.int8): 3,
    np.dtype(np.uint16): 4,
    np.dtype(np.int32): 6,
    np.dtype(np.float16): 10,
    np.dtype(np.uint32): 12,
}


@dataclass
class Layer:
    """The tensors and attributes of one layer, and the float64 weights [out_features, in_features] they stand for.

    `magnitude` is the weights' with the magnitudes of centroid and outlier added instead, which may cancel in `weight`.
    """

    tensors: dict[str, np.ndarray]
    attributes: dict[str, int]
    weight: np.ndarray
    magnitude: np.ndarray

    @property
    def bias(self) -> np.ndarray:
        bias = self.tensors["bias"]
        return bias.astype(np.float64) if bias.size else np.zeros(self.attributes["out_features"])

    def reference(self, x: np.ndarray) -> np.ndarray:
        """The layer's output in float64 for x [rows, in_features]."""
        return x.astype(np.float64) @ self.weight.T + self.bias


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Code words [width * blocks, out_features] of codes [columns, out_features] of one width."""
    rows = []
    for block in codes.astype(np.uint32).reshape(-1, 32, codes.shape[1]):
        per_word = 8 if width == 4 else 16
        bits = 4 if width == 4 else 2
        low = block & np.uint32(15 if width == 4 else 3)
        for word in low.reshape(-1, per_word, codes.shape[1]):
            rows.append(sum(word[i] << np.uint32(bits * i) for i in range(per_word)))
        if width == 3:
            rows.append(sum((block[i] >> np.uint32(2)) << np.uint32(i) for i in range(32)))
    return np.array(rows, dtype=np.uint32).reshape(-1, codes.shape[1])


def make_layer(
    out_features: int,
    in_features: int,
    widths: dict[int, int] | None = None,
    *,
    ordered: bool = False,
    outliers: float = 0.0,
    full_row: bool = False,
    bias: bool = False,
    bias_dtype: type = np.float32,
    lowest: int = -127,
    seed: int = 0,
) -> Layer:
    """A random layer; `widths` gives the stored columns of each bit-width (default: just enough of 4 bits).

    `lowest` is the least centroid: -127 is the compiler's, -128 what the format allows.
    """
    rng = np.random.default_rng(seed)
    if widths is None:
        widths = {4: -(-in_features // 32) * 32}
    columns = sum(widths.values())
    words, books, decoded = [], [], []
    for width in (4, 3, 2):
        count = widths.get(width, 0)
        codes = rng.integers(0, 2**width, (count, out_features))
        book = rng.integers(lowest, 128, (count, 2**width)).astype(np.int8)
        words.append(pack(codes, width))
        books.append(book.ravel())
        decoded.append(np.take_along_axis(book.astype(np.float64), codes, 1))
    order = np.concatenate([np.arange(in_features), np.full(columns - in_features, in_features)])
    if ordered:
        rng.shuffle(order)
    scale = rng.uniform(0.001, 0.002, columns).astype(np.float16)
    scale[order == in_features] = 0
    row_scale = rng.uniform(-1.0, 1.0, out_features).astype(np.float16)
    stored = np.concatenate(decoded)
    magnitude = np.abs(stored)
    empty = np.zeros(0, np.int32)
    index_dtype = np.uint16 if columns <= 65536 else np.int32
    ptr, index, value = empty, empty.astype(index_dtype), empty.astype(np.float16)
    if outliers > 0 or full_row:
        mask = rng.random((out_features, columns)) < outliers
        if full_row:
            mask[rng.integers(out_features)] = True
        mask &= order < in_features
        if mask.any():
            ptr = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
            index = np.nonzero(mask)[1].astype(index_dtype)
            value = (rng.normal(size=index.size) * 200).astype(np.float16)
            extra = np.zeros((out_features, columns))
            extra[mask] = value
            stored = stored + extra.T
            magnitude = magnitude + np.abs(extra.T)
    order_dtype = np.uint16 if in_features <= 65535 else np.int32
    factor = scale.astype(np.float64)[:, None] * row_scale.astype(np.float64)

    def in_feature_order(values: np.ndarray) -> np.ndarray:
        result = np.zeros((in_features + 1, out_features))
        result[order] = values
        return result[:in_features].T

    tensors = {
        "codes": np.concatenate(words),
        "codebook": np.concatenate(books),
        "scale": scale,
        "row_scale": row_scale,
        "order": order.astype(order_dtype) if ordered else np.zeros(0, order_dtype),
        "outlier_ptr": ptr,
        "outlier_index": index,
        "outlier_value": value,
        "bias": rng.normal(size=out_features if bias else 0).astype(bias_dtype),
    }
    attributes = {
        "in_features": in_features,
        "out_features": out_features,
        "columns_4": widths.get(4, 0),
        "columns_3": widths.get(3, 0),
        "columns_2": widths.get(2, 0),
    }
    return Layer(tensors, attributes, in_feature_order(stored * factor), in_feature_order(np.abs(magnitude * factor)))


def make_model(
    layer: Layer,
    *,
    accuracy_level: int = 0,
    x_type: int = TensorProto.FLOAT,
    function: onnx.FunctionProto | None = None,
    fed: str | None = None,
) -> onnx.ModelProto:
    """A model of one ClaqMatMul, x [rows, in_features] -> y; `fed` names a tensor to make a graph input instead."""
    initializers = [numpy_helper.from_array(value, name) for name, value in layer.tensors.items() if name != fed]
    node = helper.make_node(
        "ClaqMatMul",
        ["x", *NAMES],
        ["y"],
        name="layer",
        domain="com.claq",
        accuracy_level=accuracy_level,
        **layer.attributes,
    )
    inputs = [helper.make_tensor_value_info("x", x_type, ["batch", "rows", layer.attributes["in_features"]])]
    if fed:
        array = layer.tensors[fed]
        inputs.append(helper.make_tensor_value_info(fed, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    outputs = [helper.make_tensor_value_info("y", x_type, ["batch", "rows", layer.attributes["out_features"]])]
    graph = helper.make_graph([node], "one_layer", inputs, outputs, initializers)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.claq", 1)],
        functions=[function] if function else [],
        ir_version=9,
    )


class Tensor(ctypes.Structure):
    """claq_tensor of claq.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class Desc(ctypes.Structure):
    """claq_layer_desc of claq.h."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features", "columns_4", "columns_3", "columns_2")),
        *((name, Tensor) for name in NAMES),
        ("kernel", ctypes.c_char_p),
    )


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(claq_runtime.library_path())
    library.claq_layer_kernel.restype = ctypes.c_char_p
    library.claq_layer_kernel.argtypes = [ctypes.c_void_p]
    library.claq_destroy.restype = None
    library.claq_destroy.argtypes = [ctypes.c_void_p]
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
    return library


LIBRARY = _library()


class NativeError(Exception):
    """A claq_status other than CLAQ_OK, with the library's message."""


class NativeLayer:
    """A layer made through the C interface, on the kernel family of that name, tuned as CLAQ_TUNING has it."""

    def __init__(self, layer: Layer, kernel: str | None = None, tuning: str = "") -> None:
        self._arrays = {name: np.ascontiguousarray(array) for name, array in layer.tensors.items()}
        desc = Desc(struct_size=ctypes.sizeof(Desc), kernel=kernel.encode() if kernel else None, **layer.attributes)
        for name, array in self._arrays.items():
            shape = (ctypes.c_int64 * array.ndim)(*array.shape)
            setattr(desc, name, Tensor(array.ctypes.data, shape, array.ndim, DTYPES[array.dtype]))
        self._out_features = layer.attributes["out_features"]
        self._handle = ctypes.c_void_p()
        error = ctypes.create_string_buffer(512)
        with mock.patch.dict(os.environ, {"CLAQ_TUNING": tuning} if tuning else {}):
            status = LIBRARY.claq_create(ctypes.byref(desc), ctypes.byref(self._handle), error, len(error))
        if status:
            raise NativeError(error.value.decode())

    @property
    def kernel(self) -> str:
        return LIBRARY.claq_layer_kernel(self._handle).decode()

    def run(self, x: np.ndarray, accuracy_level: int = 0, threads: int = 1) -> np.ndarray:
        pool = ctypes.cast(LIBRARY.claq_pool_parallel_for, ctypes.c_void_p) if threads > 1 else None
        return self._run(x, accuracy_level, pool, threads)

    def most_tasks(self, x: np.ndarray, accuracy_level: int = 0) -> int:
        """Into how many tasks the work of a run is split at most."""
        totals = [1]

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        def one_after_the_other(_context: int, task: int, total: int, data: int) -> None:
            totals.append(total)
            call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)(task)
            for i in range(total):
                call(data, i)

        self._run(x, accuracy_level, ctypes.cast(one_after_the_other, ctypes.c_void_p), None)
        return max(totals)

    def _run(
        self, x: np.ndarray, accuracy_level: int, parallel_for: ctypes.c_void_p | None, context: int | None
    ) -> np.ndarray:
        x = np.ascontiguousarray(x)
        y = np.full((x.shape[0], self._out_features), np.nan, x.dtype)
        error = ctypes.create_string_buffer(512)
        status = LIBRARY.claq_run(
            self._handle,
            DTYPES[x.dtype],
            accuracy_level,
            x.ctypes.data,
            x.shape[0],
            y.ctypes.data,
            parallel_for,
            context,
            error,
            len(error),
        )
        if status:
            raise NativeError(error.value.decode())
        return y

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            LIBRARY.claq_destroy(self._handle)
