"""Quantized linears that split, gate or add to their own results: found where they are, left alone elsewhere."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from quantized_layers import random_layer
from torch import fx, nn

from claq_export.kernels import decoder_ops, fused_ops, ops
from claq_export.modules import ClaqLinear
from claq_export.passes import FuseEpilogues, PassContext, Pipeline

HIDDEN, STACK = 24, 40
FUSED = ("linear_add", "linear_add_norm", "linear_swiglu", "linear_split", "linear_rotary")


def linear(in_features: int, out_features: int, seed: int = 0, bias: bool = False) -> ClaqLinear:
    layer = random_layer(in_features, out_features, (4, 2), outliers=0.05, seed=seed)
    return ClaqLinear(layer, torch.randn(out_features) if bias else None)


class Stack(nn.Module):
    """One linear; what becomes of its result is the test's."""

    def __init__(self, how: object) -> None:
        super().__init__()
        self.linear = linear(HIDDEN, STACK, bias=True)
        self.how = how

    def forward(self, x: torch.Tensor) -> object:
        return self.how(self.linear(x), x)  # type: ignore[operator]


def fused(module: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, Counter[str]]:
    """The graph after the pass, checked against the module, and how often each of claq's operators is in it."""
    dim = torch.export.Dim.AUTO
    graph = torch.export.export(module, (x,), dynamic_shapes=({0: dim, 1: dim},)).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    Pipeline([FuseEpilogues()]).run(graph, PassContext())
    for size in ((2, 3), (1, 1), (4, 7)):
        value = torch.randn(*size, x.shape[-1])
        torch.testing.assert_close(graph(value), module(value))
    names = {
        ops.linear: "linear",
        **{getattr(fused_ops, name): name for name in FUSED},
    }
    return graph, Counter(names[node.target] for node in graph.graph.nodes if node.target in names)


SPLITS = {
    "split with sizes": lambda y, _: y.split([20, 12, 8], -1),
    "equal split": lambda y, _: y.split(16, 2),
    "chunk": lambda y, _: y.chunk(2, -1),
    "one part unused": lambda y, _: y.split([20, 12, 8], -1)[::2],
    "slices": lambda y, _: (y[..., :20], y[..., 20:32], y[..., 32:]),
    "slices from the end": lambda y, _: (y[..., :-8], y[..., -8:]),
    "a slice twice": lambda y, _: (y[..., :20] + 1, y[..., :20] * 2, y[..., 20:]),
    "halves gated otherwise": lambda y, _: torch.nn.functional.gelu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
    "gate read twice": lambda y, _: (lambda g, u: torch.nn.functional.silu(g) * u + g)(*y.chunk(2, -1)),
    "parts of other sizes gated": lambda y, _: (
        torch.nn.functional.silu(y.split([8, 32], -1)[0]) * y.split([8, 32], -1)[1][..., :8]
    ),
}


UNFUSED = {"halves gated otherwise", "parts of other sizes gated"}
"""Split twice in the source: two uses of the product."""


@pytest.mark.parametrize("how", SPLITS)
def test_splits(how: str) -> None:
    _, found = fused(Stack(SPLITS[how]), torch.randn(2, 3, HIDDEN))
    assert found == ({"linear": 1} if how in UNFUSED else {"linear_split": 1})


@pytest.mark.parametrize("swapped", [False, True])
def test_gated_halves(swapped: bool) -> None:
    def gate(y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        gate, up = y.chunk(2, -1)
        return up * torch.nn.functional.silu(gate) if swapped else torch.nn.functional.silu(gate) * up

    graph, found = fused(Stack(gate), torch.randn(2, 3, HIDDEN))
    assert found == {"linear_swiglu": 1}
    assert not [node for node in graph.graph.nodes if node.target is torch.ops.aten.silu.default]


ADDITIONS = {
    "residual": lambda y, x: y + torch.cat([x, x[..., :16]], -1),
    "residual first": lambda y, x: torch.cat([x, x[..., :16]], -1) + y,
}
OTHERS = {
    "a row for all": lambda y, x: y + torch.cat([x, x[..., :16]], -1)[:, :1],
    "scaled": lambda y, x: torch.add(y, torch.cat([x, x[..., :16]], -1), alpha=2),
    "itself": lambda y, _: y + y,
    "a number": lambda y, _: y + 1,
    "read elsewhere": lambda y, x: (y + torch.cat([x, x[..., :16]], -1), y),
    "four parts": lambda y, _: y.split(10, -1),
    "overlapping slices": lambda y, _: (y[..., :21], y[..., 20:]),
    "slices with a gap": lambda y, _: (y[..., :20], y[..., 21:]),
    "every second": lambda y, _: (y[..., ::2], y[..., 1::2]),
    "another axis": lambda y, _: y.transpose(0, 2).split([20, 20], 0),
    "whole and part": lambda y, _: (y[..., :20], y[..., 20:], y * 2),
}


@pytest.mark.parametrize("how", ADDITIONS)
def test_additions(how: str) -> None:
    assert fused(Stack(ADDITIONS[how]), torch.randn(2, 3, HIDDEN))[1] == {"linear_add": 1}


@pytest.mark.parametrize("how", OTHERS)
def test_what_is_left(how: str) -> None:
    assert fused(Stack(OTHERS[how]), torch.randn(2, 3, HIDDEN))[1] == {"linear": 1}


class Parallel(nn.Module):
    """A residual and two branches that are added one after another, as in GPT-J and Falcon."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(HIDDEN, HIDDEN, 1), linear(HIDDEN, HIDDEN, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first(x) + self.second(x)) + x


def test_branches_are_added_in_order() -> None:
    _, found = fused(Parallel(), torch.randn(2, 3, HIDDEN))
    assert found == {"linear": 1, "linear_add": 1}


class Normalized(nn.Module):
    """A residual sum that is normalized and goes on."""

    def __init__(self, weight: object = None) -> None:
        super().__init__()
        self.linear = linear(HIDDEN, HIDDEN, 1)
        self.weight = nn.Parameter(torch.rand(HIDDEN))
        self.made = weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + self.linear(x)
        weight = self.weight if self.made is None else self.made(self.weight, x)  # type: ignore[operator]
        return decoder_ops.rms_norm(total, weight, 1e-5), total * 2


def test_normalized_sums() -> None:
    assert fused(Normalized(), torch.randn(2, 3, HIDDEN))[1] == {"linear_add_norm": 1}


@pytest.mark.parametrize("made", [lambda weight, _: weight + 1, lambda _, x: x[0, 0]], ids=["computed", "given"])
def test_weights_that_are_not_stored_stay_outside(made: object) -> None:
    assert fused(Normalized(made), torch.randn(2, 3, HIDDEN))[1] == {"linear_add": 1}


class Turned(nn.Module):
    """Queries and keys with rotary positions, and values; what becomes of them is the test's."""

    def __init__(self, how: object, partial: bool = False) -> None:
        super().__init__()
        self.linear = linear(HIDDEN, STACK)
        self.angles = nn.Linear(HIDDEN, 2 if partial else 4, bias=False)
        self.how = how

    def forward(self, x: torch.Tensor) -> object:
        angles = self.angles(x)
        cos, sin = angles.cos(), angles.sin()
        return self.how(self.linear(x).split([24, 8, 8], -1), cos, sin)  # type: ignore[operator]


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    return decoder_ops.rotary(x, cos, sin, heads)


@pytest.mark.parametrize("partial", [False, True])
def test_turned_parts(partial: bool) -> None:
    module = Turned(lambda p, cos, sin: (turn(p[0], cos, sin, 3), turn(p[1], cos, sin, 1), p[2] + 1), partial)
    assert fused(module, torch.randn(2, 3, HIDDEN))[1] == {"linear_rotary": 1}


NOT_TURNED = {
    "read elsewhere": lambda p, cos, sin: (turn(p[0], cos, sin, 3), turn(p[1], cos, sin, 1), p[2], p[0] * 2),
    "other angles": lambda p, cos, sin: (turn(p[0], cos, sin, 3), turn(p[1], sin, cos, 1), p[2]),
    "queries alone": lambda p, cos, sin: (turn(p[0], cos, sin, 3), p[1], p[2]),
    "later angles": lambda p, cos, sin: (turn(p[0], cos * 2, sin, 3), turn(p[1], cos * 2, sin, 1), p[2]),
}


@pytest.mark.parametrize("how", NOT_TURNED)
def test_parts_that_are_split_alone(how: str) -> None:
    assert fused(Turned(NOT_TURNED[how]), torch.randn(2, 3, HIDDEN))[1] == {"linear_split": 1}
