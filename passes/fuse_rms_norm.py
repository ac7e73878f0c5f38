"""Finds root-mean-square normalization in the seven operators models spell it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels import decoder_ops
from .base import Pass, PassContext, PassResult
from .matching import Mismatch, only_user, operand, rewrite_each, shape_of, skip_casts

_aten = torch.ops.aten


class FuseRmsNorm(Pass):
    """Rewrites ``x * rsqrt(mean(x²) + epsilon) * weight`` as ``claq::rms_norm(x, weight, epsilon)``."""

    name = "fuse_rms_norm"
    doc = "Rewrites x * rsqrt(mean(x^2) + epsilon) * weight as one operator."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        return rewrite_each(gm, {_aten.rsqrt.default: _fuse}, "normalizations")


def _fuse(graph: fx.Graph, rsqrt: fx.Node) -> None:
    result, x, weight, epsilon = _match(rsqrt)
    with graph.inserting_before(result):
        call = graph.call_function(decoder_ops.rms_norm, (x, weight, epsilon))
    call.meta = dict(result.meta)
    result.replace_all_uses_with(call)


def _match(rsqrt: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, float]:
    """The node to replace, x, weight and epsilon."""
    added = operand(rsqrt, 0, _aten.add.Tensor, "what is under the root is not a mean plus a number")
    epsilon = added.args[1]
    if not isinstance(epsilon, (int, float)):
        raise Mismatch("what is added to the mean is not a number")
    mean = operand(added, 0, _aten.mean.dim, "what is under the root is not a mean plus a number")
    if mean.args[1:] != ([-1], True):
        raise Mismatch("the mean is not over the last axis")
    power = operand(mean, 0, None, "the mean is not of squares")
    square = power.target is _aten.pow.Tensor_Scalar and power.args[1] == 2
    if not square and not (power.target is _aten.mul.Tensor and power.args[0] is power.args[1]):
        raise Mismatch("the mean is not of squares")
    x: Any = power.args[0]
    scaled = only_user(rsqrt)
    if scaled.target is not _aten.mul.Tensor or x not in scaled.args:
        raise Mismatch("the root does not scale what the mean is taken of")
    node = scaled
    while True:
        user = only_user(node)
        if user.target is _aten.mul.Tensor:
            break
        if skip_casts(user) is skip_casts(node):
            node = user
            continue
        raise Mismatch("no weight is multiplied after the normalization")
    first, second = user.args[0], user.args[1]
    weight = second if first is node else first
    if not isinstance(weight, fx.Node) or len(shape_of(weight)) != 1 or shape_of(weight)[0] != shape_of(x)[-1]:
        raise Mismatch("what is multiplied after the normalization is not one weight a feature")
    source, result = skip_casts(x), user
    if _dtype(source) != _dtype(result):
        raise Mismatch(f"it turns {_dtype(source)} into {_dtype(result)}")
    return result, source, weight, float(epsilon)


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise Mismatch(f"the type of {node.name} is not known")
    return value.dtype
