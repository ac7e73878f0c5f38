"""The model-local function in stock ONNX Runtime, against weights read one by one from the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_models import OLD_PYTHON, expected_output, layer_tensors, one_layer_model, run_elsewhere, stock_session
from quantized_layers import dense_weight, layers, random_layer

from claq_export.format.layer import QuantizedLinear

TOLERANCE = {np.float32: 1e-5, np.float16: 2e-3}
TOLERANCE_OF_PRODUCTS = {np.float32: 1e-6, np.float16: 1e-3}

CASES = {
    "4 bits": random_layer(64, 50),
    "3 bits, padded": random_layer(40, 17, (3,)),
    "2 bits": random_layer(96, 8, (2,)),
    "mix, few outliers": random_layer(100, 50, (4, 3, 2), outliers=0.02),
    "mix, full row": random_layer(70, 9, (4, 2), full_row=True),
    "one output": random_layer(48, 1, (3, 2), outliers=0.2),
    "one input": random_layer(1, 20, (2,)),
    "one weight": random_layer(1, 1, (4,), full_row=True),
    "wide": random_layer(1, 3, (3,)),
}


def error(got: npt.NDArray[np.generic], wanted: npt.NDArray[np.float64]) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-6)) if got.size else 0.0


@settings(max_examples=40, deadline=None)
@given(
    layer=layers(),
    rows=st.sampled_from([0, 1, 7, 130]),
    dtype=st.sampled_from([np.float32, np.float16]),
    with_bias=st.booleans(),
)
def test_any_layer(layer: QuantizedLinear, rows: int, dtype: type[np.generic], with_bias: bool) -> None:
    rng = np.random.default_rng(0)
    bias = rng.normal(size=layer.out_features).astype(dtype) if with_bias else None
    x = rng.normal(size=(rows, layer.in_features)).astype(dtype)
    session = stock_session(one_layer_model(layer, layer_tensors(layer, bias), dtype))
    (y,) = session.run(None, {"x": x})
    assert y.dtype == dtype
    dense = dense_weight(layer)
    # Rounding errors are relative to the products, which may cancel in every output.
    products = expected_output(np.abs(dense), np.abs(x), None if bias is None else np.abs(bias))
    difference = np.abs(y - expected_output(dense, x, bias))
    assert (difference <= TOLERANCE_OF_PRODUCTS[dtype] * products + 1e-7).all()


@pytest.mark.parametrize("name", CASES)
def test_the_onnx_reference_evaluator_agrees(name: str) -> None:
    layer = CASES[name]
    model = one_layer_model(layer, layer_tensors(layer), rank=3)
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(0).normal(size=(2, 3, layer.in_features)).astype(np.float32)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    assert error(y, expected_output(dense_weight(layer), x, None)) <= TOLERANCE[np.float32]


def test_int32_indices() -> None:
    """Layers with more than 65535 inputs store their order as int32; the function takes both."""
    layer = random_layer(70, 9, (4, 2), outliers=0.1)
    tensors = layer_tensors(layer)
    tensors = {**tensors, **{name: tensors[name].astype(np.int32) for name in ("order", "outlier_index")}}
    x = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
    (y,) = stock_session(one_layer_model(layer, tensors)).run(None, {"x": x})
    assert error(y, expected_output(dense_weight(layer), x, None)) <= TOLERANCE[np.float32]


def test_constants_are_folded_when_the_session_is_created(tmp_path: Path) -> None:
    """Otherwise stock ONNX Runtime would decode the weights in every run."""
    import onnxruntime

    layer = CASES["mix, few outliers"]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = one_layer_model(layer, layer_tensors(layer, np.ones(50, np.float32)))
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # The last Cast, to the type of x, makes the graph's output and stays for its name; inside a model it goes too.
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators in (["Gemm", "Cast"], ["MatMul", "Add", "Cast"])


@pytest.mark.skipif(OLD_PYTHON is None, reason="CLAQ_ORT120_PYTHON is not set")
def test_older_onnxruntime(tmp_path: Path) -> None:
    expected: dict[str, tuple[npt.NDArray[np.float64], type[np.generic]]] = {}
    for i, layer in enumerate(CASES.values()):
        for dtype in (np.float32, np.float16):
            rng = np.random.default_rng(i)
            bias = rng.normal(size=layer.out_features).astype(dtype)
            x = rng.normal(size=(7, layer.in_features)).astype(dtype)
            name = f"{i}-{dtype.__name__}"
            onnx.save(one_layer_model(layer, layer_tensors(layer, bias), dtype), tmp_path / f"{name}.onnx")
            np.savez(tmp_path / f"{name}.in.npz", x=x)
            expected[name] = expected_output(dense_weight(layer), x, bias), dtype
    assert OLD_PYTHON is not None
    assert run_elsewhere(OLD_PYTHON, tmp_path).startswith("1.20.")
    for name, (wanted, dtype) in expected.items():
        with np.load(tmp_path / f"{name}.out.npz") as outputs:
            assert error(outputs["arr_0"], wanted) <= TOLERANCE[dtype], name


BROKEN = {
    "codes has a row too few": ("codes", lambda v: v[:-1]),
    "codes has a column too many": ("codes", lambda v: np.concatenate([v, v[:, :1]], axis=1)),
    "codebook too short": ("codebook", lambda v: v[:-4]),
    "scale too short": ("scale", lambda v: v[:-32]),
    "row_scale too short": ("row_scale", lambda v: v[:-1]),
    "order out of range": ("order", lambda v: np.full_like(v, 60000)),
    "outlier_index out of range": ("outlier_index", lambda v: np.full_like(v, 60000)),
    "outlier_value too short": ("outlier_value", lambda v: v[:-1]),
    "bias too short": ("bias", lambda v: v[:-1]),
    "bias of length one": ("bias", lambda v: v[:1]),
    "order too short": ("order", lambda v: v[:-1]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_corrupted_layer_is_an_error_not_a_crash(name: str) -> None:
    """Stock ONNX Runtime knows nothing of the format; its own checks must stop what cannot be computed."""
    layer = random_layer(70, 9, (4, 3, 2), outliers=0.1)
    tensors = layer_tensors(layer, np.ones(9, np.float32))
    target, damage = BROKEN[name]
    tensors[target] = damage(tensors[target])
    x = np.ones((2, 70), np.float32)
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        stock_session(one_layer_model(layer, tensors)).run(None, {"x": x})


def test_the_function_is_deterministic() -> None:
    from claq_export.emit import function

    first = function.claq_function("ClaqMatMul")
    function.claq_function.cache_clear()
    assert function.claq_function("ClaqMatMul") == first


def test_dense_weight_agrees_with_the_package() -> None:
    """Two readers of the format, written apart."""
    for layer in CASES.values():
        torch.testing.assert_close(layer.dequantize().double(), dense_weight(layer), rtol=1e-6, atol=1e-9)
