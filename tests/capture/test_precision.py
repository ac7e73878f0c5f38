"""Models in narrower dtypes: what is cast and what is not, values that do not fit, activations that overflow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from claq_export.capture import capture_module
from claq_export.capture.precision import check_finite, check_range, in_dtype, inputs_in_dtype
from claq_export.errors import ModelError


class Positions(nn.Module):
    """A linear between a saved table and a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.tied = self.linear.weight
        self.register_buffer("mean", torch.full((8,), 0.1))
        self.register_buffer("frequencies", torch.linspace(0, 1, 8), persistent=False)
        self.register_buffer("steps", torch.arange(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = (self.steps * self.frequencies).cos().to(x.dtype)
        return nn.functional.linear(self.linear(x - self.mean) * angles, self.tied)


def test_weights_are_cast_and_computed_tables_are_not() -> None:
    model = Positions()
    half = in_dtype(model, torch.float16)
    assert half is not model
    assert model.linear.weight.dtype == torch.float32
    assert half.linear.weight.dtype == half.mean.dtype == torch.float16
    assert half.tied is half.linear.weight
    assert half.frequencies.dtype == torch.float32
    assert half.steps.dtype == torch.int64
    assert in_dtype(half, torch.float16) is half
    assert in_dtype(half, torch.float32).linear.weight.dtype == torch.float32
    x = torch.randn(3, 8)
    torch.testing.assert_close(half(x.half()).float(), model(x), atol=5e-3, rtol=5e-3)


def test_inputs_are_cast_wherever_they_stand() -> None:
    cast = inputs_in_dtype({"a": [torch.ones(2), torch.arange(2)], "b": 3.0}, torch.bfloat16)
    assert cast["a"][0].dtype == torch.bfloat16
    assert cast["a"][1].dtype == torch.int64
    assert cast["b"] == 3.0


def test_values_beyond_float16_are_named() -> None:
    model = Positions()
    with torch.no_grad():
        model.linear.bias[3] = -70000.0
    with pytest.raises(ModelError, match=r"float16 ends at 65504.*linear\.bias \(7e\+04\).*--dtype bfloat16"):
        check_range(model, torch.float16)
    check_range(model, torch.bfloat16)
    model.mean[0] = 1e5
    with pytest.raises(ModelError, match=r"linear\.bias .*, mean \(1e\+05\)"):
        check_range(model, torch.float16)


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) ** 2).softmax(-1)


def test_the_first_operator_that_overflows_is_named() -> None:
    model = in_dtype(Squares().eval(), torch.float16)
    captured = capture_module(model, torch.ones(2, 8, dtype=torch.float16))
    assert captured.dtype == torch.float16
    small = {"x": torch.ones(2, 8, dtype=torch.float16)}
    check_finite(captured, captured.run(small), small)
    large = {"x": torch.full((2, 8), 3000.0, dtype=torch.float16)}
    with pytest.raises(ModelError, match=r"activations overflow float16, first in aten\.pow.*bfloat16"):
        check_finite(captured, captured.run(large), large)
