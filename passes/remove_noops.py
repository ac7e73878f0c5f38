"""Removes operators that do nothing at inference: dropout, detach, casts to the same dtype, slices of everything."""

from __future__ import annotations

import sys

import torch
from torch import fx

from .base import Pass, PassContext, PassResult

_aten = torch.ops.aten
_DROPOUTS = {
    _aten.dropout.default,
    _aten.feature_dropout.default,
    _aten.alpha_dropout.default,
    _aten.native_dropout.default,
}
_ALIASES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default}
_CASTS = {_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout}


class RemoveNoops(Pass):
    """Removes what only training or tracing needs, so that later passes see which linears read the same value."""

    name = "remove_noops"
    doc = "Removes dropout, detach, casts to the same dtype and slices of everything."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        removed: dict[str, int] = {}
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and _is_noop(node):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
                kind = str(node.target)
                removed[kind] = removed.get(kind, 0) + 1
        notes = tuple(f"removed {count} {kind}" for kind, count in sorted(removed.items()))
        return PassResult(gm, bool(removed), notes)


def _is_noop(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _DROPOUTS:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("train", True)
        return node.target is not _aten.native_dropout.default and training is False
    if node.target in _ALIASES:
        return True
    if node.target is _aten.slice.Tensor:
        start, end, step = (*node.args[2:], *(None, None, None)[len(node.args) - 2 :])[:3]
        return start in (None, 0) and end in (None, sys.maxsize) and step in (None, 1)
    if node.target in _CASTS:
        before, after = node.args[0].meta.get("val"), node.meta.get("val")
        return (
            isinstance(before, torch.Tensor)
            and isinstance(after, torch.Tensor)
            and before.dtype == after.dtype
            and before.device == after.device
            and not node.kwargs.get("copy", False)
            and node.kwargs.get("memory_format") is None
        )
    return False
