"""Complex values in forms that the exporter translates: rotary positions as turns of complex numbers.

DeepSeek-V2, Llama 4 and models after Meta's own Llama code turn pairs of features as complex numbers. The exporter writes such
a value as a real one with an axis of two more, for the operators that it knows so; ``unsqueeze`` and its kin are not among
them. They are run on the real view here, and the result is seen as complex again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def _axis(value: torch.Tensor, axis: int, new: int = 0) -> int:
    """An axis counted from the start, so that one more axis at the end does not move it."""
    return axis + value.dim() + new if axis < 0 else axis


# Operator -> the arguments behind the value, for the real view of the value.
_ON_REAL_VIEW: dict[Any, Callable[..., tuple[Any, ...]]] = {
    _aten.unsqueeze.default: lambda value, axis: (_axis(value, axis, 1),),
    _aten.select.int: lambda value, axis, index: (_axis(value, axis), index),
    _aten.expand.default: lambda _, sizes: ([*sizes, -1],),
    _aten.reshape.default: lambda _, sizes: ([*sizes, 2],),
    _aten.index.Tensor: lambda _, indices: (indices,),
    _aten.index_select.default: lambda value, axis, index: (_axis(value, axis), index),
}


def complex_axes_on_real_views(gm: fx.GraphModule) -> bool:
    """Rewrite in place what moves axes of complex values; True if there was anything."""
    changed = False
    for node in list(gm.graph.nodes):
        value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
        if node.target not in _ON_REAL_VIEW or not isinstance(value, torch.Tensor) or not value.is_complex():
            continue
        rest = _ON_REAL_VIEW[node.target](value, *node.args[1:])
        with gm.graph.inserting_before(node):
            real = _call(gm.graph, _aten.view_as_real.default, node.args[0])
            moved = _call(gm.graph, node.target, real, *rest)
            result = gm.graph.call_function(_aten.view_as_complex.default, (moved,))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
        changed = True
    if changed:
        gm.recompile()
    return changed


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda given: given.meta["val"]))
    return node
