"""The model-local function ClaqGather in stock ONNX Runtime, against weights read one by one from the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_models import OLD_PYTHON, run_elsewhere, stock_session, table_model
from quantized_layers import dense_weight, layers, random_layer

from claq_export.emit import function
from claq_export.format.layer import QuantizedLinear

CASES = {
    "4 bits": random_layer(64, 50),
    "3 bits, padded": random_layer(40, 17, (3,)),
    "mix, few outliers": random_layer(100, 50, (4, 3, 2), outliers=0.02),
    "mix, full row": random_layer(70, 9, (4, 2), full_row=True),
    "one row": random_layer(48, 1, (3, 2), outliers=0.2),
    "one column": random_layer(1, 20, (2,)),
}


def assert_rows(got: np.ndarray, layer: QuantizedLinear, indices: np.ndarray) -> None:
    wanted = dense_weight(layer).numpy()[indices]
    assert got.shape == wanted.shape
    tolerance = 1e-6 if got.dtype == np.float32 else 1e-3
    assert np.all(np.abs(got - wanted) <= tolerance * max(np.abs(wanted).max(initial=0), 1e-6))


@settings(max_examples=40, deadline=None)
@given(
    layer=layers(),
    shape=st.sampled_from([(0,), (1,), (7,), (130,)]),
    dtype=st.sampled_from([np.float32, np.float16]),
    index=st.sampled_from([np.int32, np.int64]),
)
def test_any_table(
    layer: QuantizedLinear, shape: tuple[int, ...], dtype: type[np.generic], index: type[np.generic]
) -> None:
    indices = np.random.default_rng(0).integers(-layer.out_features, layer.out_features, shape).astype(index)
    (rows,) = stock_session(table_model(layer, dtype, index=index)).run(None, {"indices": indices})
    assert rows.dtype == dtype
    assert_rows(rows, layer, indices)


@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (1, 1)])
def test_two_axes_of_indices(shape: tuple[int, ...]) -> None:
    layer = CASES["mix, few outliers"]
    indices = np.random.default_rng(0).integers(0, 50, shape)
    (rows,) = stock_session(table_model(layer, rank=2)).run(None, {"indices": indices})
    assert_rows(rows, layer, indices)


@pytest.mark.parametrize("name", CASES)
def test_the_onnx_reference_evaluator_agrees(name: str) -> None:
    layer = CASES[name]
    model = table_model(layer, rank=2)
    onnx.checker.check_model(model, full_check=True)
    indices = np.random.default_rng(0).integers(0, layer.out_features, (2, 3))
    (rows,) = ReferenceEvaluator(model).run(None, {"indices": indices})
    assert_rows(rows, layer, indices)


def test_the_table_stays_packed_in_the_session(tmp_path: Path) -> None:
    """Folding must not decode the vocabulary: no constant of the session is larger than the codes."""
    import onnxruntime

    layer = random_layer(64, 1000, (4, 2), outliers=0.005)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = table_model(layer)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    constants = onnx.load(tmp_path / "optimized.onnx").graph.initializer
    sizes = [onnx.numpy_helper.to_array(constant).nbytes for constant in constants]
    assert max(sizes) == layer.codes.numel() * 4
    assert sum(sizes) < 64 * 1000 * 4 / 2


@pytest.mark.parametrize("wrong", [50, -51])
def test_an_index_out_of_range_is_an_error(wrong: int) -> None:
    session = stock_session(table_model(CASES["4 bits"]))
    with pytest.raises(Exception, match="indices element out of data bounds"):
        session.run(None, {"indices": np.array([0, wrong])})


@pytest.mark.skipif(OLD_PYTHON is None, reason="CLAQ_ORT120_PYTHON is not set")
def test_older_onnxruntime(tmp_path: Path) -> None:
    indices = {}
    for i, layer in enumerate(CASES.values()):
        indices[i] = np.random.default_rng(i).integers(-layer.out_features, layer.out_features, 7)
        onnx.save(table_model(layer), tmp_path / f"{i}.onnx")
        np.savez(tmp_path / f"{i}.in.npz", indices=indices[i])
    assert OLD_PYTHON is not None
    assert run_elsewhere(OLD_PYTHON, tmp_path).startswith("1.20.")
    for i, layer in enumerate(CASES.values()):
        with np.load(tmp_path / f"{i}.out.npz") as outputs:
            assert_rows(outputs["arr_0"], layer, indices[i])


BROKEN = {
    "codes has a row too few": ("codes", lambda v: v[:-1]),
    "codebook too short": ("codebook", lambda v: v[:-4]),
    "scale too short": ("scale", lambda v: v[:-32]),
    "row_scale too short": ("row_scale", lambda v: v[:-1]),
    "order too short": ("order", lambda v: v[:-1]),
    "order out of range": ("order", lambda v: np.full_like(v, 60000)),
    "outlier_ptr too short": ("outlier_ptr", lambda v: v[:-1]),
    "outlier_index out of range": ("outlier_index", lambda v: np.full_like(v, 60000)),
    "outlier_value too short": ("outlier_value", lambda v: v[:-1]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_corrupted_table_is_an_error_not_a_crash(name: str) -> None:
    layer = random_layer(70, 9, (4, 3, 2), outliers=0.3)
    target, damage = BROKEN[name]
    changes = {target: damage(getattr(layer, target).numpy())}
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        stock_session(table_model(layer, **changes)).run(None, {"indices": np.arange(9)})


def test_the_function_is_deterministic() -> None:
    first = function.claq_function("ClaqGather")
    function.claq_function.cache_clear()
    assert function.claq_function("ClaqGather") == first
