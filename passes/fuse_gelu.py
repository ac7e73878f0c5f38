"""Finds the approximate GELU where a model spells it with tanh (GPT-2, Phi, Bloom)."""

from __future__ import annotations

import math

import torch
from torch import fx

from .base import Pass, PassContext, PassResult
from .matching import Mismatch, only_user, operand

_aten = torch.ops.aten
_LINEAR = math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR
_TOLERANCE = 1e-5
"""Relative; models give the constants with seven digits or more."""


class FuseGelu(Pass):
    """Rewrites ``0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))``, in whatever order it is multiplied out, as ``aten.gelu``.

    One operator is quantized around, written and run faster than eight, and ONNX Runtime has one of its own.
    """

    name = "fuse_gelu"
    doc = "Rewrites a GELU that is spelled out with tanh as one operator."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        fused = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target is not _aten.tanh.default:
                continue
            try:
                result, x = _match(node)
            except Mismatch:
                continue  # a tanh of another kind, a pooler's or a gate's
            with gm.graph.inserting_before(result):
                call = gm.graph.call_function(_aten.gelu.default, (x,), {"approximate": "tanh"})
            call.meta = dict(result.meta)
            result.replace_all_uses_with(call)
            fused += 1
        if fused:
            gm.graph.eliminate_dead_code()
        return PassResult(gm, bool(fused), (f"{fused} activations",) if fused else ())


def _match(tanh: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The node to replace, and x."""
    raised = only_user(tanh)
    if (
        raised.target is not _aten.add.Tensor
        or raised.kwargs
        or [_is_one(value) for value in raised.args].count(True) != 1
    ):
        raise Mismatch("one is not added to the tanh")
    result, factors = raised, 1.0
    x: fx.Node | None = None
    # Two products in any order: by a half and by x, or by the half of x.
    while x is None or factors == 1.0:
        result, other = _product(result)
        if isinstance(other, float):
            factors *= other
        elif x is not None:
            raise Mismatch("it is multiplied by two values")
        elif factors == 1.0 and other.target is _aten.mul.Tensor and (half := _scaled(other)) is not None:
            x, factors = half
        else:
            x = other
    if factors != 0.5:
        raise Mismatch(f"it is multiplied by {factors}")
    found = _polynomial(operand(tanh, 0, None, "tanh has no argument"), x)
    wanted = {1: _LINEAR, 3: _CUBIC}
    if found.keys() != wanted.keys() or any(abs(found[n] / wanted[n] - 1) > _TOLERANCE for n in wanted):
        raise Mismatch("the argument of tanh is another one")
    return result, x


def _is_one(value: object) -> bool:
    return isinstance(value, (int, float)) and value == 1


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node | float]:
    """The product that a node goes into, and by what it is multiplied."""
    user = only_user(node)
    if user.target is not _aten.mul.Tensor:
        raise Mismatch("it is not multiplied")
    other = user.args[1] if user.args[0] is node else user.args[0]
    if isinstance(other, (int, float)):
        return user, float(other)
    if not isinstance(other, fx.Node) or other is node:
        raise Mismatch("it is not multiplied by a number or another value")
    return user, other


def _scaled(node: fx.Node) -> tuple[fx.Node, float] | None:
    """Value and number of a product of both."""
    value, number = node.args
    if isinstance(value, (int, float)):
        value, number = number, value
    return (value, float(number)) if isinstance(value, fx.Node) and isinstance(number, (int, float)) else None


def _polynomial(value: object, x: fx.Node) -> dict[int, float]:
    """Coefficients by power of a value that sums, products and powers make of numbers and ``x``.

    Raises:
        Mismatch: it is made of something else.
    """
    if value is x:
        return {1: 1.0}
    if isinstance(value, (int, float)):
        return {0: float(value)}
    if not isinstance(value, fx.Node) or value.kwargs:
        raise Mismatch(f"{value} is not made of x")
    if value.target is _aten.pow.Tensor_Scalar and value.args[1] in (2, 3):
        base = _polynomial(value.args[0], x)
        product = _times(base, base)
        return product if value.args[1] == 2 else _times(product, base)
    if value.target not in (_aten.add.Tensor, _aten.mul.Tensor):
        raise Mismatch(f"{value} is not made of x")
    first, second = (_polynomial(argument, x) for argument in value.args)
    if value.target is _aten.mul.Tensor:
        return _times(first, second)
    return {power: first.get(power, 0) + second.get(power, 0) for power in first.keys() | second.keys()}


def _times(first: dict[int, float], second: dict[int, float]) -> dict[int, float]:
    product: dict[int, float] = {}
    for a, x in first.items():
        for b, y in second.items():
            product[a + b] = product.get(a + b, 0) + x * y
    return product
