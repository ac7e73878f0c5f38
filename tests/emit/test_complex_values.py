"""Rotary positions as turns of complex numbers become ONNX, as DeepSeek-V2, Llama 4 and Meta's Llama code have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_models import stock_session
from torch import nn

from claq_export.capture import capture_module
from claq_export.emit import emit_onnx


def angles(positions: int, pairs: int) -> torch.Tensor:
    turns = torch.outer(torch.arange(positions).float(), 10000.0 ** -(torch.arange(pairs) / pairs))
    return torch.polar(torch.ones_like(turns), turns)


class Turned(nn.Module):
    """Four heads of four pairs, each turned by its position."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q = nn.Linear(16, 32)
        self.how = how
        self.register_buffer("table", angles(64, 4), persistent=False)

    def turns(self, batch: int, length: int) -> torch.Tensor:
        if self.how == "view":
            return self.table[:length].view(1, length, 1, 4)
        if self.how == "expand":
            return self.table[None, :length, None].expand(batch, -1, 4, -1)
        if self.how == "select":
            return torch.stack([self.table, self.table.conj()])[0, :length].unsqueeze(-2)
        positions = torch.arange(length)[None].expand(batch, length)
        if self.how == "index_select":
            return self.table.index_select(0, positions[0])[:, None].reshape(1, -1, 1, 4)
        return self.table[positions].unsqueeze(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.q(x).view(*x.shape[:2], 4, 4, 2)
        turned = torch.view_as_complex(heads) * self.turns(*x.shape[:2])
        return torch.view_as_real(turned).flatten(2)


@pytest.mark.parametrize("how", ["view", "expand", "select", "index", "index_select"])
def test_turns_of_complex_numbers(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Turned(how).eval()
    axes = {0: "batch", 1: "sequence"}
    captured = capture_module(model, (torch.randn(2, 7, 16),), (axes,))
    path = tmp_path / "model.onnx"
    emit_onnx(captured.graph_module, captured.example_inputs, path, dynamic_shapes={"x": axes})
    session = stock_session(path)
    for size in ((2, 7, 16), (1, 1, 16), (3, 11, 16)):
        x = torch.randn(size)
        with torch.no_grad():
            expected = model(x)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
