"""``ClaqMatMul`` in standard ONNX operators: the model-local function that lets any ONNX runtime run a claq file.

The function decodes the weight of ``docs/format.md`` and multiplies by it. All of it but the multiplication depends on
constants, so ONNX Runtime folds a layer into one dense MatMul when it creates a session. Absent tensors have length
zero; the body handles them with slices and scatters that then touch nothing, because a function cannot branch on the
presence of an input without costing every session an ``If``.
"""

# mypy: ignore-errors
# The body is ONNX Script: a function of symbolic values, whose operators are typed for concrete ones.

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from onnx import numpy_helper
from onnxscript import opset18 as op
from onnxscript import script, values

DOMAIN = "com.claq"
"""Operator domain of claq."""

VERSION = 1
"""Version of the operator domain."""

OPSET = 18
"""Version of the default ONNX domain the function and the emitted models use."""

_claq = values.Opset(DOMAIN, VERSION)

_FLOAT = onnx.TensorProto.FLOAT
_INT32 = onnx.TensorProto.INT32
_INT64 = onnx.TensorProto.INT64

# Shifts broadcast over the middle axis of [rows, 1, out_features]: one step a code of the word.
_SHIFTS_4 = numpy_helper.from_array(np.arange(0, 32, 4, dtype=np.uint32).reshape(1, 8, 1))
_SHIFTS_2 = numpy_helper.from_array(np.arange(0, 32, 2, dtype=np.uint32).reshape(1, 16, 1))
_SHIFTS_1 = numpy_helper.from_array(np.arange(0, 32, 1, dtype=np.uint32).reshape(1, 32, 1))
_MASK_4 = numpy_helper.from_array(np.array(15, dtype=np.uint32))
_MASK_2 = numpy_helper.from_array(np.array(3, dtype=np.uint32))
_MASK_1 = numpy_helper.from_array(np.array(1, dtype=np.uint32))
_UINT_TWO = numpy_helper.from_array(np.array(2, dtype=np.uint32))
_ZERO_INT64 = numpy_helper.from_array(np.array([0], dtype=np.int64))


@script(_claq, default_opset=op)
def ClaqMatMul(
    x,
    codes,
    codebook,
    scale,
    row_scale,
    order,
    outlier_ptr,
    outlier_index,
    outlier_value,
    bias,
    in_features: int,
    out_features: int,
    columns_4: int,
    columns_3: int,
    columns_2: int,
    accuracy_level: int = 0,
):
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    three = op.Constant(value_ints=[3])
    four = op.Constant(value_ints=[4])
    eight = op.Constant(value_ints=[8])
    sixteen = op.Constant(value_ints=[16])
    block = op.Constant(value_ints=[32])
    k = op.Reshape(op.Constant(value_int=in_features), one)
    n = op.Reshape(op.Constant(value_int=out_features), one)
    c4 = op.Reshape(op.Constant(value_int=columns_4), one)
    c3 = op.Reshape(op.Constant(value_int=columns_3), one)
    c2 = op.Reshape(op.Constant(value_int=columns_2), one)
    stored = op.Shape(scale)
    rows_4 = op.Div(c4, eight)
    rows_43 = op.Add(rows_4, op.Div(op.Mul(c3, three), block))
    rows_432 = op.Shape(codes, start=0, end=1)
    entries_4 = op.Mul(c4, sixteen)
    entries_43 = op.Add(entries_4, op.Mul(c3, eight))
    entries_432 = op.Shape(codebook)
    shifts_2 = op.Constant(value=_SHIFTS_2)
    mask_2 = op.Constant(value=_MASK_2)

    # Four bits: eight codes a word.
    words_4 = op.Unsqueeze(op.Slice(codes, zero, rows_4, zero), one)
    code_4 = op.BitwiseAnd(
        op.BitShift(words_4, op.Constant(value=_SHIFTS_4), direction="RIGHT"), op.Constant(value=_MASK_4)
    )
    index_4 = op.Cast(op.Reshape(code_4, op.Concat(c4, n, axis=0), allowzero=1), to=_INT32)
    table_4 = op.Reshape(op.Slice(codebook, zero, entries_4, zero), op.Concat(c4, sixteen, axis=0), allowzero=1)
    value_4 = op.GatherElements(table_4, index_4, axis=1)

    # Three bits: of every three rows, two hold the low two bits and one holds the third bit.
    shape_3 = op.Concat(c3, n, axis=0)
    planes = op.Reshape(
        op.Slice(codes, rows_4, rows_43, zero), op.Concat(op.Div(c3, block), three, n, axis=0), allowzero=1
    )
    low_words = op.Unsqueeze(op.Slice(planes, zero, two, one), two)
    low = op.Reshape(op.BitwiseAnd(op.BitShift(low_words, shifts_2, direction="RIGHT"), mask_2), shape_3, allowzero=1)
    third_words = op.Slice(planes, two, three, one)
    third = op.BitwiseAnd(
        op.BitShift(third_words, op.Constant(value=_SHIFTS_1), direction="RIGHT"), op.Constant(value=_MASK_1)
    )
    high = op.BitShift(op.Reshape(third, shape_3, allowzero=1), op.Constant(value=_UINT_TWO), direction="LEFT")
    index_3 = op.Cast(op.BitwiseOr(low, high), to=_INT32)
    table_3 = op.Reshape(op.Slice(codebook, entries_4, entries_43, zero), op.Concat(c3, eight, axis=0), allowzero=1)
    value_3 = op.GatherElements(table_3, index_3, axis=1)

    # Two bits: sixteen codes a word.
    words_2 = op.Unsqueeze(op.Slice(codes, rows_43, rows_432, zero), one)
    code_2 = op.BitwiseAnd(op.BitShift(words_2, shifts_2, direction="RIGHT"), mask_2)
    index_2 = op.Cast(op.Reshape(code_2, op.Concat(c2, n, axis=0), allowzero=1), to=_INT32)
    table_2 = op.Reshape(op.Slice(codebook, entries_43, entries_432, zero), op.Concat(c2, four, axis=0), allowzero=1)
    value_2 = op.GatherElements(table_2, index_2, axis=1)

    centroids = op.Cast(op.Concat(value_4, value_3, value_2, axis=0), to=_FLOAT)

    # Outliers, rows of a CSR matrix: the row of entry i is the number of inner row pointers that are <= i.
    nnz = op.Shape(outlier_index)
    inner = op.Slice(outlier_ptr, one, op.Constant(value_ints=[-1]), zero)
    starts = op.ScatterElements(
        op.ConstantOfShape(op.Add(nnz, one), value=_ZERO_INT64),
        op.Cast(inner, to=_INT64),
        op.Expand(one, op.Shape(inner)),
        axis=0,
        reduction="add",
    )
    outlier_row = op.Slice(op.CumSum(starts, op.Constant(value_int=0)), zero, nnz, zero)
    position = op.Concat(op.Unsqueeze(op.Cast(outlier_index, to=_INT64), one), op.Unsqueeze(outlier_row, one), axis=1)
    reserved = op.ScatterND(centroids, position, op.Cast(outlier_value, to=_FLOAT), reduction="add")

    scaled = op.Mul(reserved, op.Unsqueeze(op.Cast(scale, to=_FLOAT), one))
    weight = op.Mul(scaled, op.Cast(row_scale, to=_FLOAT))

    # Stored columns back to input features; padding columns land in rows from in_features on, which are cut off.
    # An empty order stands for the identity; the Reshape refuses any other length but the right one.
    implied = op.Mul(op.Cast(op.Equal(op.Shape(order), zero), to=_INT64), stored)
    identity = op.Range(op.Constant(value_int=0), op.Squeeze(implied), op.Constant(value_int=1))
    feature = op.Reshape(op.Concat(op.Cast(order, to=_INT64), identity, axis=0), stored)
    by_feature = op.ScatterND(
        op.ConstantOfShape(op.Concat(op.Add(stored, one), n, axis=0)), op.Unsqueeze(feature, one), weight
    )
    dense = op.Slice(by_feature, zero, k, zero)

    product = op.MatMul(op.Cast(x, to=_FLOAT), dense)
    no_bias = op.ConstantOfShape(op.Mul(op.Cast(op.Equal(op.Shape(bias), zero), to=_INT64), n))
    offset = op.Reshape(op.Concat(op.Cast(bias, to=_FLOAT), no_bias, axis=0), n)
    return op.CastLike(op.Add(product, offset), x)


@cache
def claq_matmul_function() -> bytes:
    """The function as a serialized ``onnx.FunctionProto`` of domain ``com.claq``, opset 18."""
    proto = ClaqMatMul.to_function_proto()
    proto.doc_string = "y = x W^T + bias with W in the claq format, version 1 (docs/format.md), in standard operators."
    return proto.SerializeToString(deterministic=True)
