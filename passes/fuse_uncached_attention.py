"""Finds attention without a cache whose queries, keys and values come heads last, as linear layers write them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..kernels import decoder_ops
from .additive_masks import ATTENTION, attention_mask
from .base import Pass, PassContext, PassResult
from .fuse_attention import replace_result
from .matching import Mismatch, heads_first, heads_last, is_transpose, known_size, operand, shape_of, skip_copies


class FuseUncachedAttention(Pass):
    """Rewrites ``scaled_dot_product_attention`` between transposes as one ``claq::attention``, in float32.

    Encoders spend as much time on turning heads first and back as on the products between.
    """

    name = "fuse_uncached_attention"
    doc = "Rewrites attention without a cache and the transposes around it as one operator."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        notes: list[str] = []
        fused = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target is not ATTENTION:
                continue
            try:
                _fuse(gm.graph, node)
                fused += 1
            except Mismatch as reason:
                notes.append(f"{node.name} left: {reason}")
        if fused:
            gm.graph.eliminate_dead_code()
            notes.append(f"{fused} attentions")
        return PassResult(gm, bool(fused), tuple(notes))


def _fuse(graph: fx.Graph, node: fx.Node) -> None:
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    given |= node.kwargs
    if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"):
        raise Mismatch("it has dropout, a causal mask of its own, or heads that share keys")
    operands = [operand(node, index, None, "an operand is no value of the graph") for index in range(3)]
    query, key, value = map(skip_copies, operands)
    if not all(is_transpose(each, 1, 2) for each in (query, key, value)):
        raise Mismatch("its operands are not heads last values that were transposed")
    if query.meta["val"].dtype != torch.float32:
        raise Mismatch(f"it computes in {query.meta['val'].dtype}")
    heads = known_size(query, 1)
    if {known_size(key, 1), known_size(value, 1)} != {heads}:
        raise Mismatch("its keys and values have other heads")
    mask = attention_mask(node)
    of_numbers = isinstance(mask, fx.Node) and shape_of(mask) and mask.meta["val"].is_floating_point()
    if mask is not None and not of_numbers:
        raise Mismatch("its mask is not of numbers to add")
    scale: Any = given.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(known_size(query, 3))
    if not isinstance(scale, (int, float)) or scale <= 0:
        raise Mismatch("its scale is no positive number")
    with graph.inserting_before(node):
        flat = [heads_last(graph, each) for each in (query, key, value)]
        call = graph.call_function(
            decoder_ops.attention, (*flat, mask if isinstance(mask, fx.Node) else None, heads, float(scale))
        )
        call.meta["val"] = flat[0].meta["val"].new_empty((*shape_of(flat[0])[:2], shape_of(flat[2])[-1]))
        by_head = heads_first(graph, call, heads)
    replace_result(node, by_head, call)
    # It may draw random numbers (dropout), so the elimination of dead code would let it stand.
    graph.erase_node(node)
