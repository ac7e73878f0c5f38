"""Reshapes get constant shapes where these say the same for every input, and keep their computed ones elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch

from claq_export.emit import emit_onnx

CONSTANT = {
    "split": lambda x: x.view(x.shape[0], x.shape[1], 3, 8),
    "joined": lambda x: x.view(x.shape[0], x.shape[1], 3, 8).transpose(2, 3).reshape(x.shape[0], x.shape[1], 24),
    "two dynamic axes in one": lambda x: x.reshape(x.shape[0] * x.shape[1], 24),
}
COMPUTED = {
    "a dynamic axis elsewhere": lambda x: x.reshape(x.shape[0], 24, x.shape[1]),
    "an axis in front": lambda x: x.reshape(1, x.shape[0], x.shape[1], 24),
}


class Model(torch.nn.Module):
    def __init__(self, form: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(x * 2)


def check(form: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> Counter[str]:
    """Compare with PyTorch at sizes that the export did not see; return the file's operators."""
    axes = {"x": {0: "batch", 1: "sequence"}}
    path = emit_onnx(Model(form), {"x": torch.zeros(2, 5, 24)}, folder / "model.onnx", dynamic_shapes=axes).path
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, sequence in ((2, 5), (1, 1), (3, 2), (5, 5)):
        x = torch.randn(batch, sequence, 24)
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), Model(form)(x))
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", CONSTANT)
def test_constant(name: str, tmp_path: Path) -> None:
    operators = check(CONSTANT[name], tmp_path)
    assert operators["Reshape"] >= 1
    assert operators["Shape"] == operators["Concat"] == 0


@pytest.mark.parametrize("name", COMPUTED)
def test_computed(name: str, tmp_path: Path) -> None:
    operators = check(COMPUTED[name], tmp_path)
    assert operators["Reshape"] >= 1
    assert operators["Shape"] >= 1
