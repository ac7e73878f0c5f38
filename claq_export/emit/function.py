"""claq's operators in standard ONNX operators: the model-local functions that let any ONNX runtime run a claq file.

All decode the weight of ``docs/format.md``. Of ``ClaqMatMul`` all but the multiplication depends on constants, so ONNX
Runtime folds a layer into one dense MatMul when it creates a session. ``ClaqGather`` takes the code words of the rows that
are asked for before it decodes, so that a vocabulary is never unpacked as a whole. Absent tensors have length zero; the
bodies handle them with slices and scatters that then touch nothing, because a function cannot branch on the presence of
an input without costing every session an ``If``. The time of folding goes into fresh memory for intermediate tensors of
the weight's size, so there are few of them and all but four hold bytes.
"""

# mypy: ignore-errors
# The body is ONNX Script: a function of symbolic values, whose operators are typed for concrete ones.

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxscript import opset18 as op
from onnxscript import opset23 as op23
from onnxscript import script, values

DOMAIN = "com.claq"
"""Operator domain of claq."""

VERSION = 1
"""Version of the operator domain."""

OPSET = 18
"""Version of the default ONNX domain the function and the emitted models use."""

_claq = values.Opset(DOMAIN, VERSION)

_FLOAT = onnx.TensorProto.FLOAT
_UINT8 = onnx.TensorProto.UINT8
_INT32 = onnx.TensorProto.INT32
_INT64 = onnx.TensorProto.INT64

# Shifts broadcast over the middle axis of [rows, 1, out_features]: one step a code of the word.
_SHIFTS_4 = numpy_helper.from_array(np.arange(0, 32, 4, dtype=np.uint32).reshape(1, 8, 1))
_SHIFTS_2 = numpy_helper.from_array(np.arange(0, 32, 2, dtype=np.uint32).reshape(1, 16, 1))
_SHIFTS_1 = numpy_helper.from_array(np.arange(0, 32, 1, dtype=np.uint32).reshape(1, 32, 1))
_MASK_4 = numpy_helper.from_array(np.array(15, dtype=np.uint8))
_MASK_2 = numpy_helper.from_array(np.array(3, dtype=np.uint8))
_MASK_1 = numpy_helper.from_array(np.array(1, dtype=np.uint8))
_BYTE_TWO = numpy_helper.from_array(np.array(2, dtype=np.uint8))
_ZERO_FLOAT = numpy_helper.from_array(np.array([0], dtype=np.float32))
_ZERO_INT64 = numpy_helper.from_array(np.array([0], dtype=np.int64))


@script(_claq, default_opset=op)
def ClaqDecode(
    codes,
    codebook,
    scale,
    order,
    outlier_row,
    outlier_column,
    outlier_value,
    in_features: int,
    columns_4: int,
    columns_3: int,
    columns_2: int,
):
    # Columns [K, M] of M rows of the weight, in float32 and but for the rows' scales, from their code words [R, M]; the
    # outliers are given by their row among those M and their stored column, both int64. It is inlined below.
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    three = op.Constant(value_ints=[3])
    four = op.Constant(value_ints=[4])
    eight = op.Constant(value_ints=[8])
    sixteen = op.Constant(value_ints=[16])
    block = op.Constant(value_ints=[32])
    k = op.Reshape(op.Constant(value_int=in_features), one)
    n = op.Shape(codes, start=1, end=2)
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

    # Codes as bytes. Four bits: eight a word.
    words_4 = op.Unsqueeze(op.Slice(codes, zero, rows_4, zero), one)
    byte_4 = op.Cast(op.BitShift(words_4, op.Constant(value=_SHIFTS_4), direction="RIGHT"), to=_UINT8)
    code_4 = op.Reshape(op.BitwiseAnd(byte_4, op.Constant(value=_MASK_4)), op.Concat(c4, n, axis=0), allowzero=1)

    # Three bits: of every three rows, two hold the low two bits and one holds the third bit.
    shifts_2 = op.Constant(value=_SHIFTS_2)
    mask_2 = op.Constant(value=_MASK_2)
    shape_3 = op.Concat(c3, n, axis=0)
    planes = op.Reshape(
        op.Slice(codes, rows_4, rows_43, zero), op.Concat(op.Div(c3, block), three, n, axis=0), allowzero=1
    )
    low_words = op.Unsqueeze(op.Slice(planes, zero, two, one), two)
    low_byte = op.Cast(op.BitShift(low_words, shifts_2, direction="RIGHT"), to=_UINT8)
    low = op.Reshape(op.BitwiseAnd(low_byte, mask_2), shape_3, allowzero=1)
    third_words = op.Slice(planes, two, three, one)
    third_byte = op.Cast(op.BitShift(third_words, op.Constant(value=_SHIFTS_1), direction="RIGHT"), to=_UINT8)
    third = op.Reshape(op.BitwiseAnd(third_byte, op.Constant(value=_MASK_1)), shape_3, allowzero=1)
    code_3 = op.BitwiseOr(low, op.BitShift(third, op.Constant(value=_BYTE_TWO), direction="LEFT"))

    # Two bits: sixteen a word.
    words_2 = op.Unsqueeze(op.Slice(codes, rows_43, rows_432, zero), one)
    byte_2 = op.Cast(op.BitShift(words_2, shifts_2, direction="RIGHT"), to=_UINT8)
    code_2 = op.Reshape(op.BitwiseAnd(byte_2, mask_2), op.Concat(c2, n, axis=0), allowzero=1)
    code = op.Concat(code_4, code_3, code_2, axis=0)

    # Codebooks as one table of sixteen entries a stored column, in units of the weight but for the row's scale.
    table_4 = op.Reshape(op.Slice(codebook, zero, entries_4, zero), op.Concat(c4, sixteen, axis=0), allowzero=1)
    table_3 = op.Reshape(op.Slice(codebook, entries_4, entries_43, zero), op.Concat(c3, eight, axis=0), allowzero=1)
    table_2 = op.Reshape(op.Slice(codebook, entries_43, entries_432, zero), op.Concat(c2, four, axis=0), allowzero=1)
    filler_3 = op.ConstantOfShape(op.Concat(c3, eight, axis=0), value=_ZERO_FLOAT)
    filler_2 = op.ConstantOfShape(op.Concat(c2, op.Constant(value_ints=[12]), axis=0), value=_ZERO_FLOAT)
    table = op.Concat(
        op.Cast(table_4, to=_FLOAT),
        op.Concat(op.Cast(table_3, to=_FLOAT), filler_3, axis=1),
        op.Concat(op.Cast(table_2, to=_FLOAT), filler_2, axis=1),
        axis=0,
    )
    column_scale = op.Cast(scale, to=_FLOAT)
    scaled_table = op.Mul(table, op.Unsqueeze(column_scale, one))

    # An empty order stands for the identity; the Reshape refuses any other length but the right one. Where a feature is
    # stored follows by scattering; padding columns land behind the last feature and are cut off.
    column = op.Range(op.Constant(value_int=0), op.Squeeze(stored), op.Constant(value_int=1))
    implied = op.Mul(op.Cast(op.Equal(op.Shape(order), zero), to=_INT64), stored)
    listed = op.Concat(op.Cast(order, to=_INT64), op.Slice(column, zero, implied, zero), axis=0)
    feature = op.Reshape(listed, stored)
    places = op.ScatterElements(op.ConstantOfShape(op.Add(stored, one), value=_ZERO_INT64), feature, column, axis=0)
    place = op.Slice(places, zero, k, zero)
    index = op.Cast(op.Gather(code, place, axis=0), to=_INT32)
    decoded = op.GatherElements(op.Gather(scaled_table, place, axis=0), index, axis=1)

    position = op.Concat(op.Unsqueeze(op.Gather(feature, outlier_column), one), op.Unsqueeze(outlier_row, one), axis=1)
    extra = op.Mul(op.Cast(outlier_value, to=_FLOAT), op.Gather(column_scale, outlier_column))
    return op.ScatterND(decoded, position, extra, reduction="add")


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
    n = op.Reshape(op.Constant(value_int=out_features), one)

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
    outlier_column = op.Cast(outlier_index, to=_INT64)
    reserved = ClaqDecode(
        codes,
        codebook,
        scale,
        order,
        outlier_row,
        outlier_column,
        outlier_value,
        in_features=in_features,
        columns_4=columns_4,
        columns_3=columns_3,
        columns_2=columns_2,
    )
    dense = op.Mul(reserved, op.Cast(row_scale, to=_FLOAT))

    product = op.MatMul(op.Cast(x, to=_FLOAT), dense)
    no_bias = op.ConstantOfShape(op.Mul(op.Cast(op.Equal(op.Shape(bias), zero), to=_INT64), n))
    offset = op.Reshape(op.Concat(op.Cast(bias, to=_FLOAT), no_bias, axis=0), n)
    return op.CastLike(op.Add(product, offset), x)


# What the fused operators do with the product. They compute in float32, as ONNX Runtime has few kernels for bfloat16 on the
# CPU; `x` gives the type of the results. Rotation and normalization are standard in opset 23, that of decoders that have them.


@script(_claq, default_opset=op)
def AddEpilogue(product, x, residual):
    return op.CastLike(op.Add(op.Cast(product, to=_FLOAT), op.Cast(residual, to=_FLOAT)), x)


@script(_claq, default_opset=op23)
def AddNormEpilogue(product, x, residual, norm_weight, epsilon: float):
    total = op23.CastLike(op23.Add(op23.Cast(product, to=_FLOAT), op23.Cast(residual, to=_FLOAT)), x)
    normalized = op23.RMSNormalization(
        op23.Cast(total, to=_FLOAT), op23.Cast(norm_weight, to=_FLOAT), axis=-1, epsilon=epsilon
    )
    return total, op23.CastLike(normalized, x)


@script(_claq, default_opset=op)
def SwiGLUEpilogue(product, x):
    gate, up = op.Split(op.Cast(product, to=_FLOAT), num_outputs=2, axis=-1)
    return op.CastLike(op.Mul(op.Mul(gate, op.Sigmoid(gate)), up), x)


@script(_claq, default_opset=op)
def SplitEpilogue(product, x, split_0: int, split_1: int, split_2: int):
    one = op.Constant(value_ints=[1])
    sizes = op.Concat(
        op.Reshape(op.Constant(value_int=split_0), one),
        op.Reshape(op.Constant(value_int=split_1), one),
        op.Reshape(op.Constant(value_int=split_2), one),
        axis=0,
    )
    first, second, third = op.Split(op.Cast(product, to=_FLOAT), sizes, axis=-1)
    return op.CastLike(first, x), op.CastLike(second, x), op.CastLike(third, x)


@script(_claq, default_opset=op23)
def RotaryEpilogue(
    product, x, cos, sin, split_0: int, split_1: int, split_2: int, heads_0: int, heads_1: int, rotary_dim: int
):
    first, second, third = SplitEpilogue(product, x, split_0=split_0, split_1=split_1, split_2=split_2)
    wide_cos = op23.Cast(cos, to=_FLOAT)
    wide_sin = op23.Cast(sin, to=_FLOAT)
    query = op23.RotaryEmbedding(
        op23.Cast(first, to=_FLOAT), wide_cos, wide_sin, num_heads=heads_0, rotary_embedding_dim=rotary_dim
    )
    key = op23.RotaryEmbedding(
        op23.Cast(second, to=_FLOAT), wide_cos, wide_sin, num_heads=heads_1, rotary_embedding_dim=rotary_dim
    )
    return op23.CastLike(query, x), op23.CastLike(key, x), third


@script(_claq, default_opset=op)
def ClaqGather(
    indices,
    codes,
    codebook,
    scale,
    row_scale,
    order,
    outlier_ptr,
    outlier_index,
    outlier_value,
    like,
    in_features: int,
    out_features: int,
    columns_4: int,
    columns_3: int,
    columns_2: int,
):
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    end = op.Constant(value_ints=[9223372036854775807])
    k = op.Reshape(op.Constant(value_int=in_features), one)
    n = op.Reshape(op.Constant(value_int=out_features), one)
    row = op.Reshape(indices, last)

    # Entries first to behind - 1 of the outliers belong to a row; no row has any where there are no row pointers.
    no_pointers = op.Mul(op.Cast(op.Equal(op.Shape(outlier_ptr), zero), to=_INT64), op.Add(n, one))
    pointers = op.Concat(op.Cast(outlier_ptr, to=_INT64), op.ConstantOfShape(no_pointers, value=_ZERO_INT64), axis=0)
    first = op.Gather(op.Slice(pointers, zero, last, zero), row)
    counts = op.Sub(op.Gather(op.Slice(pointers, one, end, zero), row), first)
    # The outliers of all rows asked for, one after another: entry i belongs to as many rows as end at or before i.
    behind = op.CumSum(counts, op.Constant(value_int=0))
    total = op.ReduceSum(counts, zero, keepdims=1)
    ends = op.ScatterElements(
        op.ConstantOfShape(op.Add(total, one), value=_ZERO_INT64),
        behind,
        op.Expand(one, op.Shape(behind)),
        axis=0,
        reduction="add",
    )
    outlier_row = op.Slice(op.CumSum(ends, op.Constant(value_int=0)), zero, total, zero)
    shift = op.Gather(op.Sub(first, op.Sub(behind, counts)), outlier_row)
    entry = op.Add(op.Range(op.Constant(value_int=0), op.Squeeze(total), op.Constant(value_int=1)), shift)
    decoded = ClaqDecode(
        op.Gather(codes, row, axis=1),
        codebook,
        scale,
        order,
        outlier_row,
        op.Gather(op.Cast(outlier_index, to=_INT64), entry),
        op.Gather(outlier_value, entry),
        in_features=in_features,
        columns_4=columns_4,
        columns_3=columns_3,
        columns_2=columns_2,
    )
    dense = op.Mul(decoded, op.Cast(op.Gather(row_scale, row), to=_FLOAT))
    shape = op.Concat(op.Shape(indices), k, axis=0)
    return op.CastLike(op.Reshape(op.Transpose(dense, perm=[1, 0]), shape, allowzero=1), like)


# The forms that ONNX Runtime fuses: see fused_forms.py.
@script(_claq, default_opset=op)
def ClaqAttention(query, key, value, mask, num_heads: int, scale: float):
    one = op.Constant(value_ints=[1])
    heads = op.Reshape(op.Constant(value_int=num_heads), one)
    split = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    # Each side by the root, as PyTorch does.
    root = op.Sqrt(op.Constant(value_float=scale))
    queries = op.Mul(op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3]), root)
    keys = op.Mul(op.Transpose(op.Reshape(key, split), perm=[0, 2, 3, 1]), root)
    values = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    weights = op.Softmax(op.Add(op.MatMul(queries, keys), mask), axis=-1)
    result = op.Transpose(op.MatMul(weights, values), perm=[0, 2, 1, 3])
    return op.Reshape(result, op.Constant(value_ints=[0, 0, -1]))


@script(_claq, default_opset=op23)
def ClaqCachedAttention(
    query, key, value, mask, past_key, past_value, q_num_heads: int, kv_num_heads: int, scale: float
):
    y, present_key, present_value = op23.Attention(
        query,
        key,
        value,
        mask,
        past_key,
        past_value,
        q_num_heads=q_num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
    )
    return y, present_key, present_value


@script(_claq, default_opset=op23)
def NarrowCachedAttention(
    query, key, value, mask, past_key, past_value, q_num_heads: int, kv_num_heads: int, scale: float
):
    # What is new counts as it will when it is cached.
    y, present_key, present_value = op23.Attention(
        query,
        op23.CastLike(op23.CastLike(key, past_key), query),
        op23.CastLike(op23.CastLike(value, past_value), query),
        mask,
        op23.CastLike(past_key, query),
        op23.CastLike(past_value, query),
        q_num_heads=q_num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
    )
    return y, op23.CastLike(present_key, past_key), op23.CastLike(present_value, past_value)


_FORMAT = "W in the claq format, version 1 (docs/format.md)"

# Of each operator that holds a layer what follows the product, if it multiplies by W, and its meaning.
_LAYERS = {
    "ClaqMatMul": (None, "y = x W^T + bias"),
    "ClaqMatMulAdd": (AddEpilogue, "y = x W^T + bias + residual"),
    "ClaqMatMulAddNorm": (AddNormEpilogue, "x W^T + bias + residual and its RMS normalization"),
    "ClaqMatMulSwiGLU": (SwiGLUEpilogue, "y = silu(gate) * up; gate and up are the halves of x W^T + bias"),
    "ClaqMatMulSplit": (SplitEpilogue, "Parts side by side of x W^T + bias"),
    "ClaqMatMulRotary": (RotaryEpilogue, "Parts of x W^T + bias, the first two with rotary positions"),
    "ClaqGather": (None, "Rows of W"),
}

PRODUCTS = tuple(name for name in _LAYERS if name != "ClaqGather")
"""Operators that multiply by a layer's weight; of all of them the first ten inputs are those of ``ClaqMatMul``."""

LAYER_OPERATORS = tuple(_LAYERS)
"""Operators that hold a layer: inputs 1 to 8 are its tensors."""

ATTENTION = "ClaqAttention"
"""Attention in float32 without a cache: queries, keys and values, heads last, and a mask to add."""

CACHED_ATTENTION = "ClaqCachedAttention"
"""``Attention`` of opset 23 in float32 to a cache in float32 or float16: as :data:`ATTENTION`, and the past; it gives the
longer cache too."""

_ATTENTIONS = {
    ATTENTION: (ClaqAttention, "Attention"),
    CACHED_ATTENTION: (ClaqCachedAttention, "Attention to a cache, which it makes longer"),
}


@cache
def claq_function(operator: str, narrow_cache: bool = False) -> bytes:
    """An operator's function as a serialized ``onnx.FunctionProto`` of domain ``com.claq``, opset 18, where needed 23.

    Args:
        operator: its name.
        narrow_cache: that of :data:`CACHED_ATTENTION` for caches of any type. The usual one has no casts, of which ONNX Runtime
            keeps those in front of an output even if they change nothing.
    """
    if operator in _ATTENTIONS:
        function, meaning = _ATTENTIONS[operator]
        if operator == CACHED_ATTENTION and narrow_cache:
            function = NarrowCachedAttention
        proto = function.to_function_proto()
        proto.name = operator
        proto.doc_string = f"{meaning}, in standard operators."
        return _self_contained(proto)
    epilogue, meaning = _LAYERS[operator]
    proto = (ClaqGather if operator == "ClaqGather" else ClaqMatMul).to_function_proto()
    if epilogue is not None:
        _append(proto, epilogue.to_function_proto())
    proto.name = operator
    proto.doc_string = f"{meaning}; {_FORMAT}, in standard operators."
    return _self_contained(proto)


def functions_of(operators: Iterable[str], narrow_cache: bool = False) -> list[onnx.FunctionProto]:
    """The functions that a model with nodes of these operators needs; ``ClaqMatMul`` is always among them.

    Args:
        operators: their names.
        narrow_cache: the model has a key/value cache in another type than its arithmetic.
    """
    used = {"ClaqMatMul", *operators}
    return [
        onnx.FunctionProto.FromString(claq_function(name, narrow_cache))
        for name in (*_LAYERS, *_ATTENTIONS)
        if name in used
    ]


def _append(proto: onnx.FunctionProto, epilogue: onnx.FunctionProto) -> None:
    """Let a function that multiplies go on with an epilogue, whose inputs are the product, ``x`` and inputs of its own."""
    own = epilogue.input[2:]
    results = [f"y_{index}" for index in range(len(epilogue.output))]
    call = helper.make_node(epilogue.name, [proto.output[0], proto.input[0], *own], results)
    proto.input.extend(own)
    proto.node.extend(_body(epilogue, call))
    proto.attribute.extend(epilogue.attribute)
    del proto.output[:], proto.opset_import[:]
    proto.output.extend(results)
    proto.opset_import.extend(epilogue.opset_import)


def _self_contained(proto: onnx.FunctionProto) -> bytes:
    """A function with the bodies of claq's own functions in the place of their calls, so that a file holds operators only."""
    callees = {callee.name: callee for callee in (f.to_function_proto() for f in (ClaqDecode, SplitEpilogue))}
    nodes = list(proto.node)
    while (position := next((i for i, node in enumerate(nodes) if node.op_type in callees), None)) is not None:
        call = nodes[position]
        # Attributes are passed on under the same names, so references to them stay as they are.
        assert all(attribute.ref_attr_name == attribute.name for attribute in call.attribute)
        nodes[position : position + 1] = _body(callees[call.op_type], call)
    del proto.node[:]
    proto.node.extend(nodes)
    for number, node in enumerate(proto.node):
        node.name = f"n{number}"
    others = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(others)
    return proto.SerializeToString(deterministic=True)


def _body(callee: onnx.FunctionProto, call: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes of a function with the values of a call of it; others get the function's name in front."""
    names = {**dict(zip(callee.input, call.input, strict=True)), **dict(zip(callee.output, call.output, strict=True))}
    body = []
    for inner in callee.node:
        node = onnx.NodeProto()
        node.CopyFrom(inner)
        for field in (node.input, node.output):
            renamed = [names.get(name, f"{callee.name}_{name}") if name else "" for name in field]
            del field[:]
            field.extend(renamed)
        body.append(node)
    return body
