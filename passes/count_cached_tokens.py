"""Reads the number of cached tokens off the attention mask, so that the cache may be a buffer with room for more of them."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..kernels import decoder_ops
from .base import Pass, PassContext, PassResult

_SIZE = torch.ops.aten.sym_size.int
_BATCH, _TOKENS = 0, 2  # axes of keys and values [batch, heads, tokens, size]


class CountCachedTokens(Pass):
    """Puts ``attention_mask.shape[1] - input_ids.shape[1]`` in the place of the length of a past key or value.

    Both are the number of cached tokens where the past holds these and nothing else. Where it is a buffer with room for more,
    as ``ClaqCachedAttention`` takes one, its length is that room.
    """

    name = "count_cached_tokens"
    doc = "Reads the number of cached tokens off the attention mask instead of off the cache."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        inputs = {str(node.target): node for node in gm.graph.nodes if node.op == "placeholder"}
        mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
        lengths = [user for past in past_inputs(gm.graph) for user in past.users if _is_size(user, _TOKENS)]
        if mask is None or tokens is None or not lengths:
            return PassResult(gm, False, ("nothing depends on the length of the cache, or there is no mask",))
        with gm.graph.inserting_before(list(inputs.values())[-1].next):
            sizes = [gm.graph.call_function(_SIZE, (value, 1)) for value in (mask, tokens)]
            cached = gm.graph.call_function(operator.sub, tuple(sizes))
        for size, value in zip(sizes, (mask, tokens), strict=True):
            size.meta["val"] = value.meta["val"].shape[1]
        cached.meta["val"] = sizes[0].meta["val"] - sizes[1].meta["val"]
        for node in lengths:
            node.replace_all_uses_with(cached)
            gm.graph.erase_node(node)
        return PassResult(gm, True, (f"{len(lengths)} lengths of the cache",))


def past_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders of past keys and values."""
    return [
        node for node in graph.nodes if node.op == "placeholder" and str(node.target).startswith("past_key_values_")
    ]


def takes_buffers(graph: fx.Graph) -> bool:
    """Whether past keys and values are read by ``claq::cached_attention`` alone, which takes buffers, and by what asks for the
    size of their batch."""
    pasts = past_inputs(graph)
    return bool(pasts) and all(
        user.target is decoder_ops.cached_attention or _is_size(user, _BATCH) for past in pasts for user in past.users
    )


def _is_size(node: fx.Node, axis: int) -> bool:
    return bool(node.target is _SIZE and node.args[1] == axis)
