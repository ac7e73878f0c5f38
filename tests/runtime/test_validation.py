"""Layers with one thing wrong: each is refused with a message that names the tensor and what was expected."""

import ctypes
import mmap
import os

import numpy as np
import pytest
from runtime_layers import LIBRARY, Desc, NativeError, NativeLayer, Tensor, make_layer


def good():
    return make_layer(6, 40, {4: 32, 2: 32}, ordered=True, outliers=0.2, bias=True)


def padding(layer) -> int:
    return int(np.flatnonzero(layer.tensors["order"] == 40)[0])


def test_the_layer_without_change_is_accepted():
    assert NativeLayer(good(), "portable").kernel == "portable"


def replace(name, change):
    def apply(layer):
        layer.tensors[name] = change(layer.tensors[name])

    return apply


def assign(name, index, value):
    def apply(layer):
        layer.tensors[name][index] = value

    return apply


def attribute(name, value):
    def apply(layer):
        layer.attributes[name] = value

    return apply


def point_at_padding(layer):
    layer.tensors["outlier_ptr"] = np.array([0, 0, 0, 0, 0, 0, 1], np.int32)
    layer.tensors["outlier_index"] = np.array([padding(layer)], np.uint16)
    layer.tensors["outlier_value"] = np.ones(1, np.float16)


def same_feature_twice(layer):
    used = np.flatnonzero(layer.tensors["order"] < 40)
    layer.tensors["order"][used[1]] = layer.tensors["order"][used[0]]


def one_feature_missing(layer):
    used = np.flatnonzero(layer.tensors["order"] < 40)
    layer.tensors["order"][used[0]] = 40
    layer.tensors["scale"][used[0]] = 0


CASES = [
    (attribute("in_features", 0), "in_features: is 0, expected 1 to"),
    (attribute("in_features", -3), "in_features: is -3, expected 1 to"),
    (attribute("out_features", -1), "out_features: is -1, expected 1 to"),
    (attribute("out_features", 2**62), "out_features: is 4611686018427387904, expected 1 to"),
    (attribute("columns_4", -32), "columns_4: is -32, expected 0 to"),
    (attribute("columns_2", 33), "columns_2: is 33, expected a multiple of 32"),
    (attribute("columns_2", 0), r"columns_4 \+ columns_3 \+ columns_2: is 32, expected in_features = 40 to"),
    (attribute("columns_3", 32), r"codes: shape is \[6, 6\], expected \[9, 6\]"),
    (attribute("out_features", 5), r"codes: shape is \[6, 6\], expected \[6, 5\]"),
    (replace("codes", lambda a: a[:-1]), r"codes: shape is \[5, 6\], expected \[6, 6\]"),
    (replace("codes", lambda a: a.ravel()), r"codes: shape is \[36\], expected \[6, 6\]"),
    (replace("codes", lambda a: a.view(np.int32)), "codes: is int32, expected uint32"),
    (replace("codebook", lambda a: a[1:]), r"codebook: shape is \[639\], expected \[640\]"),
    (replace("codebook", lambda a: a.astype(np.float16)), "codebook: is float16, expected int8"),
    (replace("scale", lambda a: a[:-1]), r"scale: shape is \[63\], expected \[64\]"),
    (assign("scale", 5, np.nan), "scale: element 5 is nan, expected a finite value >= 0"),
    (assign("scale", 5, np.inf), "scale: element 5 is inf, expected a finite value >= 0"),
    (assign("scale", 5, -1), "scale: element 5 is -1, expected a finite value >= 0"),
    (
        lambda layer: assign("scale", padding(layer), 1)(layer),
        r"scale: element \d+ is 1, expected 0 because the column is padding",
    ),
    (assign("row_scale", 2, np.inf), "row_scale: element 2 is inf, expected a finite value$"),
    (replace("row_scale", lambda a: a[:0]), r"row_scale: shape is \[0\], expected \[6\]"),
    (assign("order", 0, 41), r"order: element 0 is 41, expected 0 to 40 \(the last means padding\)"),
    (same_feature_twice, r"order: element \d+ is \d+, which occurs before; expected every feature exactly once"),
    (one_feature_missing, "order: holds 39 of the 40 input features, expected every feature exactly once"),
    (replace("order", lambda a: a[:-1]), r"order: shape is \[63\], expected \[64\]"),
    (replace("order", lambda a: a.astype(np.int32)), "order: is int32, expected uint16"),
    (assign("outlier_ptr", 0, 1), "outlier_ptr: element 0 is 1, expected 0"),
    (assign("outlier_ptr", 3, -7), "outlier_ptr: element 3 is -7, expected at least the one before"),
    (assign("outlier_ptr", 6, 2**31 - 8), "outlier_ptr: ends with 2147483640, expected at most 240"),
    (assign("outlier_ptr", 6, 241), "outlier_ptr: ends with 241, expected at most 240"),
    (replace("outlier_ptr", lambda a: a[:-1]), r"outlier_ptr: shape is \[6\], expected \[7\]"),
    (
        replace("outlier_ptr", lambda a: a[:0]),
        r"outlier_index: has \d+ elements, expected 0 because outlier_ptr is empty",
    ),
    (replace("outlier_index", lambda a: a[:-1]), r"outlier_index: shape is \[\d+\], expected \[\d+\]"),
    (assign("outlier_index", -1, 64), r"outlier_index: element \d+ is 64, expected a stored column, 0 to 63"),
    (
        assign("outlier_index", 1, 0),
        r"outlier_index: element 1 is 0 after \d+, expected strictly ascending columns within",
    ),
    (point_at_padding, r"outlier_index: element 0 is \d+, a padding column; expected a column of an input feature"),
    (assign("outlier_value", 4, np.inf), "outlier_value: element 4 is inf, expected a finite value"),
    (replace("outlier_value", lambda a: a[:-1]), r"outlier_value: shape is \[\d+\], expected \[\d+\]"),
    (replace("bias", lambda a: a[:-1]), r"bias: shape is \[5\], expected \[6\]"),
    (replace("bias", lambda a: a.astype(np.int32)), "bias: is int32, expected float32, float16 or bfloat16"),
]


@pytest.mark.parametrize(("damage", "message"), CASES, ids=[message for _, message in CASES])
def test_bad_layer_is_refused(damage, message):
    layer = good()
    damage(layer)
    with pytest.raises(NativeError, match=f"^{message}"):
        NativeLayer(layer)


def test_tensors_at_odd_addresses_are_read():
    layer, shifted = good(), good()
    for name, tensor in layer.tensors.items():
        buffer = bytearray(1) + tensor.tobytes()
        shifted.tensors[name] = np.frombuffer(buffer, tensor.dtype, offset=1).reshape(tensor.shape)
    assert not shifted.tensors["codes"].flags.aligned
    x = np.random.default_rng(0).normal(size=(3, layer.attributes["in_features"])).astype(np.float32)
    np.testing.assert_array_equal(NativeLayer(shifted).run(x, 4), NativeLayer(layer).run(x, 4))


def test_all_outlier_parts_are_empty_or_none():
    layer = good()
    for name in ("outlier_ptr", "outlier_index", "outlier_value"):
        layer.tensors[name] = layer.tensors[name][:0]
    assert NativeLayer(layer)
    layer.tensors["outlier_ptr"] = np.zeros(7, np.int32)
    with pytest.raises(NativeError, match="outlier_ptr: has 7 elements, expected 0 because outlier_index is empty"):
        NativeLayer(layer)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_as_many_outliers_as_there_may_be_are_read():
    """Of full rows, which all are the same pages, so that the array takes no memory."""
    rows, columns = 32768, 65536
    count = 2**31 - 1 - 1024  # the most, near the end of 32 bits
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def reserve(size: int, protection: int) -> int:
        address = libc.mmap(
            None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0
        )  # MAP_NORESERVE
        assert address != ctypes.c_void_p(-1).value
        return address

    repeated = 64  # rows in the file
    size, stretch = 2 * rows * columns, 2 * columns * repeated
    file = os.memfd_create("row")
    os.write(file, np.tile(np.arange(columns, dtype=np.uint16), repeated).tobytes())
    index = reserve(size, 0)
    for at in range(index, index + size, stretch):
        assert libc.mmap(at, stretch, mmap.PROT_READ, mmap.MAP_SHARED | 0x10, file, 0) == at  # MAP_FIXED
    os.close(file)
    nothing = reserve(size, mmap.PROT_READ)
    try:
        pointers = np.append(np.arange(rows) * columns, count).astype(np.int32)
        zeros = np.zeros(4 * columns, np.int8)

        def tensor(address, dtype, *shape):
            return Tensor(address, (ctypes.c_int64 * len(shape))(*shape), len(shape), dtype)

        desc = Desc(struct_size=ctypes.sizeof(Desc), in_features=columns, out_features=rows, columns_2=columns)
        desc.codes = tensor(nothing, 12, columns // 16, rows)
        desc.codebook = tensor(zeros.ctypes.data, 3, 4 * columns)
        desc.scale = tensor(zeros.ctypes.data, 10, columns)
        desc.row_scale = tensor(zeros.ctypes.data, 10, rows)
        desc.order = tensor(None, 6, 0)
        desc.outlier_ptr = tensor(pointers.ctypes.data, 6, rows + 1)
        desc.outlier_index = tensor(index, 4, count)
        desc.outlier_value = tensor(nothing, 10, count)
        desc.bias = tensor(None, 4, 0)
        error = ctypes.create_string_buffer(256)
        assert LIBRARY.claq_create(ctypes.byref(desc), ctypes.byref(ctypes.c_void_p()), error, ctypes.c_size_t(256))
        # The bias is looked at last.
        assert error.value == b"bias: is uint16, expected float32, float16 or bfloat16"
    finally:
        libc.munmap(index, size)
        libc.munmap(nothing, size)
