"""GELU in the file is one operator for ONNX Runtime, in both forms, with the values of PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from claq_export.emit import emit_onnx

FORMS = {"none": "Gelu", "tanh": "FastGelu"}


class Activation(torch.nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.gelu = torch.nn.GELU(approximate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gelu(x) + 1


def emit(approximate: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    example = {"x": torch.zeros(2, 3, 40, dtype=dtype)}
    return emit_onnx(Activation(approximate), example, folder / "gelu.onnx", dynamic_shapes={"x": {0: "batch"}}).path


@pytest.mark.parametrize("approximate", FORMS)
def test_onnxruntime_fuses_it(approximate: str, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(emit(approximate, tmp_path), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert sorted(nodes) == sorted([FORMS[approximate], "Add"])


@pytest.mark.parametrize(
    "level", [ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("approximate", FORMS)
def test_values(
    approximate: str, dtype: torch.dtype, bound: float, level: ort.GraphOptimizationLevel, tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(emit(approximate, tmp_path, dtype), options, providers=["CPUExecutionProvider"])
    largest = torch.finfo(dtype).max
    x = torch.cat([torch.linspace(-9, 9, 5 * 3 * 40 - 4), torch.tensor([0.0, -0.0, 30000, -30000])])
    if dtype == torch.float32 and approximate == "none":
        x[0], x[1] = largest, -largest
    x = x.reshape(5, 3, 40).to(dtype)
    (found,) = session.run(None, {"x": x.numpy()})
    wanted = torch.nn.functional.gelu(x.double(), approximate=approximate) + 1
    error = np.abs(found.astype(np.float64) - wanted.numpy()) / np.maximum(1, np.abs(wanted.numpy()))
    assert error.max() < bound
