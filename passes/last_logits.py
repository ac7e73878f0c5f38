"""Leaves the output head the last token's state alone, so that a prompt costs one row of logits instead of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import Pass, PassContext, PassResult
from .matching import Mismatch, operand, shape_of

_aten = torch.ops.aten
_ELEMENTWISE = {
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.tanh.default,
    _aten.to.dtype,
    _aten._to_copy.default,
    _aten.contiguous.default,
    _aten.clone.default,
    _aten.alias.default,
}


class LastLogits(Pass):
    """Cuts ``x[batch, sequence, hidden]`` in front of the linear that makes the first output to its last token.

    Between that linear and the output only operators that act on each element (scales, soft caps, casts) may stand.
    """

    name = "last_logits"
    doc = "Gives the output head the last token alone."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        output = next(node for node in gm.graph.nodes if node.op == "output")
        results: Any = output.args[0]
        try:
            head = _head(results[0] if isinstance(results, (list, tuple)) else results)
            states = operand(head, 0, None, "the output head multiplies no value of the graph")
            if len(shape_of(states)) != 3:
                raise Mismatch("the output head does not take [batch, sequence, hidden]")
        except Mismatch as reason:
            return PassResult(gm, False, (str(reason),))
        with gm.graph.inserting_before(head):
            last = gm.graph.call_function(_aten.select.int, (states, 1, -1))
            last.meta["val"] = states.meta["val"][:, -1]
            row = gm.graph.call_function(_aten.unsqueeze.default, (last, 1))
            row.meta["val"] = last.meta["val"].unsqueeze(1)
        head.replace_input_with(states, row)
        node = head
        while node.op != "output":
            # Every node on the way has one tensor operand and keeps its last axis.
            node.meta["val"] = node.meta["val"][:, -1:]
            node = next(iter(node.users))
        return PassResult(gm, True, (f"{head.name} sees the last token",))


def _head(node: Any) -> fx.Node:
    """The linear behind an output."""
    while isinstance(node, fx.Node) and node.target in _ELEMENTWISE:
        if len(node.users) != 1 or any(isinstance(operand, fx.Node) for operand in node.args[1:]):
            raise Mismatch(f"{node.name}, between the output head and the logits, is more than a function of one value")
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not _aten.linear.default:
        raise Mismatch("the logits are not made by a linear layer")
    if len(node.users) != 1:
        raise Mismatch("what the output head makes is read elsewhere too")
    return node
