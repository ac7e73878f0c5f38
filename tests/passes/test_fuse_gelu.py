"""GELU spelled out with tanh becomes one operator, in every way that models spell it; other uses of tanh stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from claq_export.passes import FuseGelu, PassContext

_gelu = torch.ops.aten.gelu.default
ROOT = math.sqrt(2 / math.pi)
Form = Callable[[torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """An activation between two sums, as after a linear with a bias."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.bias = nn.Parameter(torch.linspace(-1, 1, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(x + self.bias) + 1


def fused(form: Form) -> tuple[fx.GraphModule, int]:
    graph = torch.export.export(Block(form), (torch.zeros(2, 12),)).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    result = FuseGelu().run(graph, PassContext())
    graph.recompile()
    count = sum(node.target is _gelu for node in graph.graph.nodes)
    assert result.modified == bool(count)
    return graph, count


def huggingface(name: str) -> Form:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def bloom(x: torch.Tensor) -> torch.Tensor:
    from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

    return bloom_gelu_forward(x)


FORMS = {
    "gelu_new": huggingface("gelu_new"),
    "gelu_fast": huggingface("gelu_fast"),
    "gelu_accurate": huggingface("gelu_accurate"),
    "bloom": bloom,
    "half last": lambda x: x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3))) * 0.5,
    "half of the sum": lambda x: x * (0.5 * (torch.tanh((x * x * x * 0.044715 + x) * ROOT) + 1)),
}

OTHERS = {
    "a pooler": torch.tanh,
    "another constant": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    "another factor": lambda x: 0.25 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3))),
    "another value": lambda x: 0.5 * (x + 1) * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3))),
    "no cube": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * x)),
    "a square": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2))),
    "two are added": lambda x: 0.5 * x * (2 + torch.tanh(ROOT * (x + 0.044715 * x**3))),
    "a sine inside": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.sin(x) ** 3))),
    "no tanh": nn.functional.silu,
}


def read_twice(x: torch.Tensor) -> torch.Tensor:
    tanh = torch.tanh(ROOT * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + tanh) + tanh


@pytest.mark.parametrize("name", FORMS)
def test_found(name: str) -> None:
    graph, count = fused(FORMS[name])
    assert count == 1
    assert not any(node.target is torch.ops.aten.tanh.default for node in graph.graph.nodes)
    x = torch.cat([torch.linspace(-8, 8, 60), torch.tensor([0.0, 1e-6, -1e-6, 50.0] * 3)]).view(6, 12)[:2]
    torch.testing.assert_close(graph(x), Block(FORMS[name])(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("form", [*OTHERS.values(), read_twice], ids=[*OTHERS, "read twice"])
def test_left_alone(form: Form) -> None:
    _, count = fused(form)
    assert count == 0
