"""ONNX models of one ClaqMatMul or ClaqGather node each, built by hand, and running models in another ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from claq_export.emit.function import DOMAIN, OPSET, VERSION, claq_function
from claq_export.format.layer import QuantizedLinear

OLD_PYTHON = os.environ.get("CLAQ_ORT120_PYTHON")
"""Interpreter of an environment with ONNX Runtime 1.20 and numpy; tests that need it are skipped without it."""


def layer_tensors(
    layer: QuantizedLinear, bias: npt.NDArray[np.generic] | None = None
) -> dict[str, npt.NDArray[np.generic]]:
    """Initializers of the node by input name."""
    tensors = {name: tensor.numpy() for name, tensor in layer.tensors().items()}
    return {**tensors, "bias": np.zeros(0, np.float32) if bias is None else bias}


def one_layer_model(
    layer: QuantizedLinear,
    tensors: Mapping[str, npt.NDArray[np.generic]],
    dtype: type[np.generic] = np.float32,
    *,
    rank: int = 2,
) -> onnx.ModelProto:
    """A checked model with input ``x``, output ``y`` and the model-local function."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node("ClaqMatMul", ["x", *tensors], ["y"], domain=DOMAIN, accuracy_level=0, **layer.attributes())
    axes = [f"d{i}" for i in range(rank - 1)]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", kind, [*axes, layer.in_features])],
        [helper.make_tensor_value_info("y", kind, [*axes, layer.out_features])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[onnx.FunctionProto.FromString(claq_function("ClaqMatMul"))],
        ir_version=10,
    )


def table_model(
    layer: QuantizedLinear,
    dtype: type[np.generic] = np.float32,
    *,
    index: type[np.generic] = np.int64,
    rank: int = 1,
    with_function: bool = True,
    **changes: npt.NDArray[np.generic],
) -> onnx.ModelProto:
    """A model of one ClaqGather node named ``table``, input ``indices``, output ``y``; ``changes`` replace tensors."""
    tensors = {name: tensor.numpy() for name, tensor in layer.tensors().items()}
    tensors = {**tensors, "like": np.zeros(0, dtype), **changes}
    node = helper.make_node(
        "ClaqGather", ["indices", *tensors], ["y"], name="table", domain=DOMAIN, **layer.attributes()
    )
    axes = [f"d{i}" for i in range(rank)]
    graph = helper.make_graph(
        [node],
        "table",
        [helper.make_tensor_value_info("indices", helper.np_dtype_to_tensor_dtype(np.dtype(index)), axes)],
        [
            helper.make_tensor_value_info(
                "y", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [*axes, layer.in_features]
            )
        ],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[onnx.FunctionProto.FromString(claq_function("ClaqGather"))] if with_function else [],
        ir_version=10,
    )


def stock_session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    """A session without any custom operator library."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def expected_output(
    weight: torch.Tensor, x: npt.NDArray[np.generic], bias: npt.NDArray[np.generic] | None
) -> npt.NDArray[np.float64]:
    """float64 ``x Wᵀ + b``."""
    y: npt.NDArray[np.float64] = x.astype(np.float64) @ weight.numpy().T
    return y if bias is None else y + bias.astype(np.float64)


_RUNNER = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
for model in sorted(Path(sys.argv[1]).glob("*.onnx")):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    with np.load(model.with_suffix(".in.npz")) as inputs:
        outputs = session.run(None, dict(inputs))
    np.savez(model.with_suffix(".out.npz"), *outputs)
print(onnxruntime.__version__)
"""


def run_elsewhere(python: str, folder: Path) -> str:
    """Run every ``a.onnx`` of ``folder`` on ``a.in.npz`` into ``a.out.npz``; returns the version of ONNX Runtime."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(
        [python, "-c", _RUNNER, str(folder)], capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
