"""GELU and attention in the file: few operators for ONNX Runtime, with the values of PyTorch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from claq_export.emit import emit_onnx

FORMS = {"none": "Gelu", "tanh": "FastGelu"}
MASKS = ["none", "bool", "float"]


def optimized(path: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs for a model, and how many of each."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 4
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def results(path: Path, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The first output of a model as it is in the file, and as ONNX Runtime rewrites it."""
    found = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
    return found


class Activation(torch.nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.gelu = torch.nn.GELU(approximate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gelu(x) + 1


def emit_gelu(approximate: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    example = {"x": torch.zeros(2, 3, 40, dtype=dtype)}
    return emit_onnx(Activation(approximate), example, folder / "gelu.onnx", dynamic_shapes={"x": {0: "batch"}}).path


@pytest.mark.parametrize("approximate", FORMS)
def test_gelu_is_one_operator(approximate: str, tmp_path: Path) -> None:
    assert optimized(emit_gelu(approximate, tmp_path)) == Counter({FORMS[approximate]: 1, "Add": 1})


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("approximate", FORMS)
def test_values_of_gelu(approximate: str, dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    largest = torch.finfo(dtype).max
    x = torch.cat([torch.linspace(-9, 9, 5 * 3 * 40 - 4), torch.tensor([0.0, -0.0, 30000, -30000])])
    if dtype == torch.float32 and approximate == "none":
        x[0], x[1] = largest, -largest
    x = x.reshape(5, 3, 40).to(dtype)
    wanted = torch.nn.functional.gelu(x.double(), approximate=approximate) + 1
    for found in results(emit_gelu(approximate, tmp_path, dtype), {"x": x}):
        error = np.abs(found.astype(np.float64) - wanted.numpy()) / np.maximum(1, np.abs(wanted.numpy()))
        assert error.max() < bound


class SelfAttention(torch.nn.Module):
    """Two heads of size 24, read and written as an encoder's linears do: ``[batch, sequence, features]``."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (2, 24)).transpose(1, 2) for part in x.chunk(3, -1))
        heads = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        return heads.transpose(1, 2).flatten(2)


def attention_inputs(mask: str, dtype: torch.dtype, batch: int = 2, sequence: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sequence)
    inputs = {"x": torch.randn(batch, sequence, 144, generator=generator).to(dtype)}
    allowed = torch.rand(batch, 1, sequence, sequence, generator=generator) < 0.6
    allowed |= torch.eye(sequence, dtype=torch.bool)
    if mask == "bool":
        inputs["mask"] = allowed
    if mask == "float":
        inputs["mask"] = torch.where(allowed, torch.randn(allowed.shape, generator=generator), -1e4).to(dtype)
    return inputs


def emit_attention(mask: str, dtype: torch.dtype, scale: float | None, folder: Path) -> Path:
    axes = {"x": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 2: "sequence", 3: "sequence"}}
    example = attention_inputs(mask, dtype)
    shapes = {name: axes[name] for name in example}
    return emit_onnx(SelfAttention(scale), example, folder / "attention.onnx", dynamic_shapes=shapes).path


@pytest.mark.parametrize(
    ("dtype", "bound", "scale"),
    [
        (torch.float32, 2e-6, None),
        (torch.float32, 2e-6, 0.3),
        (torch.float32, 2e-6, -0.3),
        (torch.float32, 2e-6, 0.0),
        (torch.float16, 4e-3, None),
    ],
)
@pytest.mark.parametrize("mask", MASKS)
def test_values_of_attention(mask: str, dtype: torch.dtype, bound: float, scale: float | None, tmp_path: Path) -> None:
    inputs = attention_inputs(mask, dtype, 3, 11)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    wanted = SelfAttention(scale)(**exact).numpy()
    for found in results(emit_attention(mask, dtype, scale, tmp_path), inputs):
        assert np.abs(found - wanted).max() < bound


@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_few_operators(mask: str, tmp_path: Path) -> None:
    operators = optimized(emit_attention(mask, torch.float32, None, tmp_path))
    assert operators["IsNaN"] == 0
    assert operators["Mul"] == operators["Where"] - (mask == "bool") == 0
    assert operators["Transpose"] <= 4
    assert operators["FusedMatMul"] + operators["MatMul"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_position_that_may_look_at_nothing_stays_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    inputs = attention_inputs("bool", dtype)
    inputs["x"] *= 8
    inputs["mask"][0, 0, 3] = False
    for found in results(emit_attention("bool", dtype, None, tmp_path), inputs):
        assert np.isfinite(found).all()
