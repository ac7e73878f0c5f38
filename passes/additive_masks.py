"""Turns the boolean masks of attention into finite numbers to add, one node a mask however many layers read it."""

from __future__ import annotations

import torch
from torch import fx

from .base import Pass, PassContext, PassResult

_aten = torch.ops.aten
ATTENTION = _aten.scaled_dot_product_attention.default


class AdditiveMasks(Pass):
    """Rewrites ``attention(q, k, v, mask: bool)`` as ``attention(q, k, v, where(mask, 0, lowest / 2))``.

    Runtimes disagree on a row that may see nothing (padding on the left): NaN, zeros or a mean. With half the lowest
    finite number in the place of minus infinity it is a mean of the values everywhere (ONNX Runtime takes the lowest
    itself for minus infinity), and never a NaN that would reach the cache. Rows that see something do not change.

    float16 has no number that low: where a runtime adds in float32, a score still counts beside -32752, where it adds in
    float16 it does not. There a row that may see nothing sees everything instead, which all compute alike.
    """

    name = "additive_masks"
    doc = "Turns boolean attention masks into finite numbers to add, once for all layers."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        notes: list[str] = []
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target is not ATTENTION:
                continue
            mask = attention_mask(node)
            if not isinstance(mask, fx.Node):
                continue
            value, query = mask.meta.get("val"), node.args[0].meta.get("val")
            if not isinstance(value, torch.Tensor) or not isinstance(query, torch.Tensor):
                notes.append(f"{node.name} left: the types of its mask and query are not known")
                continue
            if value.dtype != torch.bool:
                notes.append(f"{node.name} left: its mask is {value.dtype}, not boolean")
                continue
            key = (mask, query.dtype)
            if key not in made:
                if query.dtype == torch.float16:
                    mask = _seeing_something(gm.graph, mask)
                with gm.graph.inserting_after(mask):
                    added = gm.graph.call_function(_aten.where.Scalar, (mask, 0.0, torch.finfo(query.dtype).min / 2))
                added.meta["val"] = value.to(torch.get_default_dtype())
                if query.dtype != added.meta["val"].dtype:  # numbers have the default dtype, whatever the model's
                    with gm.graph.inserting_after(added):
                        added = gm.graph.call_function(_aten._to_copy.default, (added,), {"dtype": query.dtype})
                    added.meta["val"] = value.to(query.dtype)
                made[key] = added
            set_attention_mask(node, made[key])
        return PassResult(gm, bool(made), tuple(notes))


def _seeing_something(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """A boolean mask whose rows without a True are all True."""
    value = mask.meta["val"]
    with graph.inserting_after(mask):
        seeing = graph.call_function(_aten.any.dim, (mask, -1, True))
    seeing.meta["val"] = value.any(-1, keepdim=True)
    with graph.inserting_after(seeing):
        blind = graph.call_function(_aten.logical_not.default, (seeing,))
    blind.meta["val"] = seeing.meta["val"].logical_not()
    with graph.inserting_after(blind):
        mask = graph.call_function(_aten.logical_or.default, (mask, blind))
    mask.meta["val"] = value
    return mask


def attention_mask(node: fx.Node) -> object:
    """The mask of an ``aten.scaled_dot_product_attention`` node, or None."""
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def set_attention_mask(node: fx.Node, mask: fx.Node) -> None:
    """Give an ``aten.scaled_dot_product_attention`` node another mask."""
    if len(node.args) > 3:
        node.update_arg(3, mask)
    else:
        node.update_kwarg("attn_mask", mask)
