"""Finds attention without a cache whose queries, keys and values come heads last, as linear layers write them."""

from __future__ import annotations

import torch
from torch import fx

from ..kernels import decoder_ops
from .additive_masks import ATTENTION, attention_mask
from .base import Pass, PassContext, PassResult
from .fuse_attention import attention_arguments, attention_scale, check_not_broadcast, replace_result
from .matching import (
    Mismatch,
    heads_first,
    heads_last,
    is_transpose,
    known_size,
    operand,
    rewrite_each,
    same_sizes,
    shape_of,
    skip_copies,
)


class FuseUncachedAttention(Pass):
    """Rewrites ``scaled_dot_product_attention`` between transposes as one ``claq::attention``, in float32.

    Encoders spend as much time on turning heads first and back as on the products between.
    """

    name = "fuse_uncached_attention"
    doc = "Rewrites attention without a cache and the transposes around it as one operator."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        return rewrite_each(gm, {ATTENTION: _fuse}, "attentions")


def _fuse(graph: fx.Graph, node: fx.Node) -> None:
    given = attention_arguments(node)
    if given.get("enable_gqa"):
        raise Mismatch("its heads share keys")
    operands = [operand(node, index, None, "an operand is no value of the graph") for index in range(3)]
    query, key, value = map(skip_copies, operands)
    if not all(is_transpose(each, 1, 2) for each in (query, key, value)):
        raise Mismatch("its operands are not heads last values that were transposed")
    check_not_broadcast(query, key, value)
    if not same_sizes(shape_of(node)[:3], shape_of(query)[:3]):
        raise Mismatch("its mask is of a larger batch than its queries")
    if query.meta["val"].dtype != torch.float32:
        raise Mismatch(f"it computes in {query.meta['val'].dtype}")
    heads = known_size(query, 1)
    if {known_size(key, 1), known_size(value, 1)} != {heads}:
        raise Mismatch("its keys and values have other heads")
    mask = attention_mask(node)
    of_numbers = isinstance(mask, fx.Node) and shape_of(mask) and mask.meta["val"].is_floating_point()
    if mask is not None and not of_numbers:
        raise Mismatch("its mask is not of numbers to add")
    scale = attention_scale(given, query)
    with graph.inserting_before(node):
        flat = [heads_last(graph, each) for each in (query, key, value)]
        call = graph.call_function(
            decoder_ops.attention, (*flat, mask if isinstance(mask, fx.Node) else None, heads, scale)
        )
        call.meta["val"] = flat[0].meta["val"].new_empty((*shape_of(flat[0])[:2], shape_of(flat[2])[-1]))
        by_head = heads_first(graph, call, heads)
    replace_result(node, by_head, call)
    # It may draw random numbers (dropout), so the elimination of dead code would let it stand.
    graph.erase_node(node)
