"""The operator inside ONNX Runtime: registration, types, precedence over the function, bad layers, concurrency."""

import concurrent.futures
import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from runtime_layers import Layer, make_layer, make_model

import claq_runtime


def make_session(model: onnx.ModelProto, options: onnxruntime.SessionOptions | None = None):
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4
    claq_runtime.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(layer: Layer, x: np.ndarray, **model_options) -> np.ndarray:
    return make_session(make_model(layer, **model_options)).run(None, {"x": x})[0]


def relative_error(y: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(y - reference).max() / np.abs(reference).max())


MIXES = [
    (50, 40, {4: 64}),
    (50, 100, {4: 32, 3: 64, 2: 32}),
    (384, 1536, {4: 96, 2: 1440}),
    (48, 96, {3: 96}),
    (1, 1, {2: 32}),
]


@pytest.mark.parametrize(("out_features", "in_features", "widths"), MIXES)
@pytest.mark.parametrize("extras", [False, True])
def test_float32_matches_dense_weights(out_features, in_features, widths, extras):
    layer = make_layer(
        out_features, in_features, widths, ordered=extras, outliers=0.02 * extras, full_row=extras, bias=extras
    )
    x = np.random.default_rng(1).normal(size=(2, 3, in_features)).astype(np.float32)
    y = run(layer, x)
    assert y.shape == (2, 3, out_features)
    assert relative_error(y, layer.reference(x)) < 2e-6


def test_accuracy_level_4_is_close():
    layer = make_layer(64, 1024, {4: 512, 3: 256, 2: 256}, ordered=True, outliers=0.01)
    x = np.random.default_rng(1).normal(size=(1, 5, 1024)).astype(np.float32)
    assert 1e-5 < relative_error(run(layer, x, accuracy_level=4), layer.reference(x)) < 1e-2


def test_environment_forces_the_arithmetic(monkeypatch):
    layer = make_layer(64, 256, {4: 128, 2: 128}, outliers=0.01)
    x = np.random.default_rng(1).normal(size=(1, 5, 256)).astype(np.float32)
    exact, rounded = run(layer, x), run(layer, x, accuracy_level=4)
    assert not np.array_equal(exact, rounded)
    monkeypatch.setenv("CLAQ_ACCURACY", "fp32")
    np.testing.assert_array_equal(run(layer, x, accuracy_level=4), exact)
    monkeypatch.setenv("CLAQ_ACCURACY", "int8")
    np.testing.assert_array_equal(run(layer, x), rounded)
    monkeypatch.setenv("CLAQ_ACCURACY", "int4")
    with pytest.raises(Exception, match="CLAQ_ACCURACY: is 'int4', expected fp32 or int8"):
        run(layer, x)


def test_float16():
    layer = make_layer(64, 256, ordered=True, bias=True, bias_dtype=np.float16)
    x = np.random.default_rng(1).normal(size=(1, 5, 256)).astype(np.float16)
    y = run(layer, x, x_type=TensorProto.FLOAT16)
    assert y.dtype == np.float16
    assert relative_error(y, layer.reference(x)) < 1e-3


def test_bfloat16():
    import ml_dtypes

    layer = make_layer(64, 256, {2: 256})
    layer.tensors["bias"] = np.zeros(0, ml_dtypes.bfloat16)
    values = np.random.default_rng(1).normal(size=(1, 5, 256)).astype(ml_dtypes.bfloat16)
    session = make_session(make_model(layer, x_type=TensorProto.BFLOAT16))
    x = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), TensorProto.BFLOAT16)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x)
    output = np.zeros((1, 5, 64), np.uint16)
    y = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(output, TensorProto.BFLOAT16)
    binding.bind_ortvalue_output("y", y)
    session.run_with_iobinding(binding)
    got = output.view(ml_dtypes.bfloat16).astype(np.float64)
    assert relative_error(got, layer.reference(values.astype(np.float64))) < 1e-2


def test_many_features_use_int32_indices():
    layer = make_layer(3, 65600, {2: 65600}, ordered=True, outliers=0.001)
    assert layer.tensors["order"].dtype == np.int32
    assert layer.tensors["outlier_index"].dtype == np.int32
    x = np.random.default_rng(1).normal(size=(1, 2, 65600)).astype(np.float32)
    assert relative_error(run(layer, x), layer.reference(x)) < 1e-5


def test_order_and_outlier_index_of_different_types():
    layer = make_layer(3, 65536, {2: 65536}, ordered=True, outliers=0.001)
    assert layer.tensors["order"].dtype == np.int32
    assert layer.tensors["outlier_index"].dtype == np.uint16
    x = np.random.default_rng(1).normal(size=(1, 2, 65536)).astype(np.float32)
    assert relative_error(run(layer, x), layer.reference(x)) < 1e-5


@pytest.mark.parametrize("shape", [(0, 3, 40), (2, 0, 40)])
def test_empty_batch(shape):
    y = run(make_layer(50, 40), np.zeros(shape, np.float32), accuracy_level=4)
    assert y.shape == (*shape[:2], 50)


def wrong_function() -> onnx.FunctionProto:
    """A function of the operator's name whose result no correct kernel gives: y = -7 everywhere."""
    nodes = [
        helper.make_node("MatMul", ["x", "zeros"], ["z"]),
        helper.make_node("Constant", [], ["seven"], value_float=-7.0),
        helper.make_node("Add", ["z", "seven"], ["y"]),
    ]
    nodes.insert(
        0,
        helper.make_node("Constant", [], ["zeros"], value=onnx.numpy_helper.from_array(np.zeros((40, 50), np.float32))),
    )
    inputs = ["x", "codes", "codebook", "scale", "row_scale", "order"]
    inputs += ["outlier_ptr", "outlier_index", "outlier_value", "bias"]
    attributes = ["in_features", "out_features", "columns_4", "columns_3", "columns_2", "accuracy_level"]
    return helper.make_function(
        "com.claq", "ClaqMatMul", inputs, ["y"], nodes, [helper.make_opsetid("", 18)], attributes
    )


def test_kernel_takes_precedence_over_function(tmp_path):
    layer = make_layer(50, 40)
    model = make_model(layer, function=wrong_function())
    x = np.random.default_rng(1).normal(size=(1, 3, 40)).astype(np.float32)
    stock = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.all(stock.run(None, {"x": x})[0] == -7)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = make_session(model, options)
    assert relative_error(session.run(None, {"x": x})[0], layer.reference(x)) < 2e-6
    with open(session.end_profiling()) as file:
        operators = {event["args"].get("op_name") for event in json.load(file) if event.get("cat") == "Node"}
    assert "ClaqMatMul" in operators


def test_register_twice_is_harmless():
    options = onnxruntime.SessionOptions()
    claq_runtime.register(options)
    claq_runtime.register(options)
    layer = make_layer(50, 40)
    x = np.ones((1, 1, 40), np.float32)
    assert relative_error(make_session(make_model(layer), options).run(None, {"x": x})[0], layer.reference(x)) < 2e-6


def test_computed_input_is_refused():
    with pytest.raises(Exception, match=r"scale: is computed by the graph or fed at run time, expected a constant"):
        make_session(make_model(make_layer(50, 40), fed="scale"))


def test_wrong_last_dimension_is_refused():
    model = make_model(make_layer(50, 40))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "any"
    with pytest.raises(Exception, match="x: the last dimension is 41, expected in_features = 40"):
        make_session(model).run(None, {"x": np.zeros((1, 1, 41), np.float32)})


@pytest.mark.parametrize("axes", [16, 17])
def test_many_axes(axes):
    layer = make_layer(50, 40)
    model = make_model(layer)
    for value in (model.graph.input[0], model.graph.output[0]):
        del value.type.tensor_type.shape.dim[:-1]
        for _ in range(axes - 1):
            value.type.tensor_type.shape.dim.insert(0, onnx.TensorShapeProto.Dimension(dim_value=1))
    session = make_session(model)
    x = np.ones((1,) * (axes - 1) + (40,), np.float32)
    if axes > 16:
        with pytest.raises(Exception, match="ClaqMatMul: x: has 17 axes, expected at most 16"):
            session.run(None, {"x": x})
    else:
        assert session.run(None, {"x": x})[0].shape == (1,) * 15 + (50,)


def test_a_tensor_of_many_axes_is_named():
    layer = make_layer(50, 40)
    layer.tensors["row_scale"] = layer.tensors["row_scale"].reshape((1,) * 16 + (50,))
    with pytest.raises(Exception, match="ClaqMatMul node 'layer': row_scale: has 17 axes, expected at most 16"):
        make_session(make_model(layer))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("n" * 255, "n" * 255),
        ("n" * 256, "n" * 256),
        ("n" * 300, "n" * 256 + r"\.\.\."),
        ("\u00e9n" * 100, "\u00e9n" * 85 + r"\.\.\."),
    ],
)
def test_a_long_name_of_a_node_is_shortened(name, shown):
    model = make_model(make_layer(50, 40), accuracy_level=3)
    model.graph.node[0].name = name
    with pytest.raises(Exception, match=f"ClaqMatMul node '{shown}': accuracy_level: is 3"):
        make_session(model)


@pytest.mark.parametrize("value", [4.0, "4", [4], [4.0]])
def test_an_attribute_of_another_type_is_refused(value):
    for name in ("accuracy_level", "in_features"):
        model = make_model(make_layer(50, 40))
        attributes = model.graph.node[0].attribute
        attributes.remove(next(entry for entry in attributes if entry.name == name))
        attributes.append(helper.make_attribute(name, value))
        with pytest.raises(Exception, match=f"{name}: the attribute is of another type, expected an integer"):
            make_session(model)


def test_without_an_accuracy_level_it_is_float32():
    layer = make_layer(50, 40)
    model = make_model(layer)
    attributes = model.graph.node[0].attribute
    attributes.remove(next(entry for entry in attributes if entry.name == "accuracy_level"))
    x = np.random.default_rng(1).normal(size=(1, 3, 40)).astype(np.float32)
    np.testing.assert_array_equal(make_session(model).run(None, {"x": x})[0], run(layer, x))


def test_bad_accuracy_level_is_refused():
    with pytest.raises(Exception, match="accuracy_level: is 3, expected 0, 1 or 4"):
        make_session(make_model(make_layer(50, 40), accuracy_level=3))


def test_missing_attribute_is_refused():
    layer = make_layer(50, 40)
    del layer.attributes["columns_2"]
    with pytest.raises(Exception, match="columns_2: the attribute is missing"):
        make_session(make_model(layer))


def test_bad_layer_names_node_and_tensor():
    layer = make_layer(50, 40)
    layer.tensors["scale"][3] = np.nan
    with pytest.raises(
        Exception, match=r"ClaqMatMul node 'layer': scale: element 3 is nan, expected a finite value >= 0"
    ):
        make_session(make_model(layer))


def test_external_data_file(tmp_path):
    layer = make_layer(512, 512, ordered=True, outliers=0.01)
    path = tmp_path / "model.onnx"
    onnx.save(make_model(layer), path, save_as_external_data=True, location="model.data", size_threshold=1024)
    options = onnxruntime.SessionOptions()
    claq_runtime.register(options)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(1, 3, 512)).astype(np.float32)
    assert relative_error(session.run(None, {"x": x})[0], layer.reference(x)) < 2e-6


def test_turns_with_int8_products_of_onnx_runtime():
    """Both configure the tile registers of AMX where there are any, on the same thread."""
    layer = make_layer(96, 256, {4: 256})
    random = np.random.default_rng(1)
    x = random.normal(size=(33, 256)).astype(np.float32)
    codes = random.integers(0, 256, (33, 256), dtype=np.uint8)
    weight = random.integers(-128, 128, (256, 80), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "integers",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [None, 256])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [None, 80])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    integers = make_session(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), options
    )
    session = make_session(make_model(layer, accuracy_level=4), options)
    expected = codes.astype(np.int32) @ weight.astype(np.int32)
    first = session.run(None, {"x": x[None]})[0]
    assert 1e-5 < relative_error(first, layer.reference(x[None])) < 1e-2
    for _ in range(3):
        np.testing.assert_array_equal(integers.run(None, {"x": codes})[0], expected)
        np.testing.assert_array_equal(session.run(None, {"x": x[None]})[0], first)


@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_concurrent_runs(accuracy_level):
    layer = make_layer(700, 300, {4: 128, 3: 96, 2: 96}, ordered=True, outliers=0.01, bias=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 3
    session = make_session(make_model(layer, accuracy_level=accuracy_level), options)
    rng = np.random.default_rng(1)
    inputs = [rng.normal(size=(1, rows, 300)).astype(np.float32) for rows in (1, 2, 7, 33, 64)]
    expected = [session.run(None, {"x": x})[0] for x in inputs]

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(inputs), 60):
            np.testing.assert_array_equal(session.run(None, {"x": inputs[i]})[0], expected[i])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
