"""The operator ClaqGather inside ONNX Runtime: rows, types, precedence over the function, bad tables and indices."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import stock_session, table_model
from quantized_layers import layers, random_layer

from claq_export.format.layer import QuantizedLinear

claq_runtime = pytest.importorskip("claq_runtime")


def session_of(model, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4
    claq_runtime.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@settings(max_examples=30, deadline=None)
@given(
    layer=layers(),
    shape=st.sampled_from([(0,), (1,), (7,), (300,)]),
    dtype=st.sampled_from([np.float32, np.float16]),
    index=st.sampled_from([np.int32, np.int64]),
)
def test_any_table(
    layer: QuantizedLinear, shape: tuple[int, ...], dtype: type[np.generic], index: type[np.generic]
) -> None:
    indices = np.random.default_rng(0).integers(-layer.out_features, layer.out_features, shape).astype(index)
    (rows,) = session_of(table_model(layer, dtype, index=index)).run(None, {"indices": indices})
    assert rows.dtype == dtype
    # Rounded as the reader of the package rounds, hence equal bit for bit.
    np.testing.assert_array_equal(rows, layer.dequantize().numpy().astype(dtype)[indices])


def test_kernel_takes_precedence_over_function(tmp_path) -> None:
    layer = random_layer(40, 30, (4, 3), outliers=0.05)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    model = table_model(layer)
    session = session_of(model, options)
    (rows,) = session.run(None, {"indices": np.arange(30)})
    np.testing.assert_allclose(rows, stock_session(model).run(None, {"indices": np.arange(30)})[0], rtol=1e-6)
    with open(session.end_profiling()) as file:
        operators = {event["args"].get("op_name") for event in json.load(file) if event.get("cat") == "Node"}
    assert operators == {"ClaqGather"}


def test_it_needs_no_function() -> None:
    layer = random_layer(40, 30, (2,))
    (rows,) = session_of(table_model(layer, rank=3, with_function=False)).run(
        None, {"indices": np.zeros((2, 0, 3), np.int64)}
    )
    assert rows.shape == (2, 0, 3, 40)


def test_int32_tensors_of_wide_tables() -> None:
    layer = random_layer(65600, 3, (4, 2), outliers=0.001)
    assert layer.order.numpy().dtype == np.int32
    (rows,) = session_of(table_model(layer)).run(None, {"indices": np.array([2, 0])})
    np.testing.assert_array_equal(rows, layer.dequantize().numpy()[[2, 0]])


@pytest.mark.parametrize("wrong", [30, -31, 1 << 40])
def test_an_index_out_of_range_is_an_error(wrong: int) -> None:
    session = session_of(table_model(random_layer(40, 30)))
    with pytest.raises(Exception, match=f"ClaqGather: indices: element 1 is {wrong}, expected -30 to 29"):
        session.run(None, {"indices": np.array([0, wrong])})
    assert session.run(None, {"indices": np.array([-30])})[0].shape == (1, 40)


BROKEN = {
    "codes": (lambda v: v[:-1], r"codes: shape is"),
    "codebook": (lambda v: v[:-4], r"codebook: shape is"),
    "scale": (lambda v: v * np.nan, r"scale: element 0 is -?nan"),
    "row_scale": (lambda v: v[:-1], r"row_scale: shape is"),
    "order": (lambda v: np.zeros_like(v), r"order: element 1 is 0, which occurs before"),
    "outlier_ptr": (lambda v: v[::-1], r"outlier_ptr: element 0 is"),
    "outlier_index": (lambda v: np.full_like(v, 60000), r"outlier_index: element 0 is 60000"),
    "outlier_value": (lambda v: v * np.inf, r"outlier_value: element \d+ is -?(inf|nan)"),
    "like": (lambda _: np.zeros(3, np.float32), r"like: expected a tensor of one dimension of length 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_table_names_node_and_tensor(name: str) -> None:
    layer = random_layer(70, 9, (4, 3, 2), outliers=0.3)
    damage, message = BROKEN[name]
    present = np.zeros(0) if name == "like" else getattr(layer, name).numpy()
    with pytest.raises(Exception, match=r"ClaqGather node 'table': " + message):
        session_of(table_model(layer, **{name: damage(present)}))


def test_a_missing_attribute_is_refused() -> None:
    model = table_model(random_layer(40, 30), with_function=False)
    attributes = model.graph.node[0].attribute
    del attributes[[attribute.name for attribute in attributes].index("columns_2")]
    with pytest.raises(Exception, match="ClaqGather node 'table': columns_2: the attribute is missing"):
        session_of(model)
