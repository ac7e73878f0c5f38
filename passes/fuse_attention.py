"""Finds attention to a cache: scaled dot products over keys and values that a past was put in front of."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..kernels import decoder_ops
from .additive_masks import ATTENTION, attention_mask
from .base import Pass, PassContext, PassResult
from .matching import (
    RESHAPES,
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

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Stream:
    """Keys or values: the cache they are joined into, its two parts, and what reads the cache for the attention."""

    joined: fx.Node
    past: fx.Node
    new: fx.Node
    heads: int
    reader: fx.Node | None


class FuseAttention(Pass):
    """Rewrites cache, repeated heads and ``scaled_dot_product_attention`` as one ``claq::cached_attention``.

    Queries, keys and values are read heads last, as linear layers write them, so that no transpose remains.
    """

    name = "fuse_attention"
    doc = "Rewrites attention to a cache, with grouped heads, as one operator that also makes the longer cache."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        return rewrite_each(gm, {ATTENTION: _fuse, _aten.softmax.int: _spelled_out}, "attentions")


def attention_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ``aten.scaled_dot_product_attention`` node by their names.

    Raises:
        Mismatch: it has dropout, or a causal mask of its own.
    """
    given: dict[str, Any] = dict(
        zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)
    )
    given |= node.kwargs
    if given.get("dropout_p") or given.get("is_causal"):
        raise Mismatch("it has dropout, or a causal mask of its own")
    return given


def check_not_broadcast(query: fx.Node, key: fx.Node, value: fx.Node) -> None:
    """See that queries, keys and values ``[batch, heads, sequence, size]`` are of one batch, keys and values of one sequence.

    Raises:
        Mismatch: they are broadcast against one another, which claq's operators do not do.
    """
    query_sizes, key_sizes, value_sizes = map(shape_of, (query, key, value))
    batches = [query_sizes[:1], key_sizes[:1], value_sizes[:1]]
    if not all(same_sizes(batches[0], each) for each in batches[1:]):
        raise Mismatch("its queries, keys and values are of several batches")
    if not same_sizes(key_sizes[2:3], value_sizes[2:3]):
        raise Mismatch("its keys and values are of several lengths")


def attention_scale(given: dict[str, Any], query: fx.Node) -> float:
    """What scores are multiplied by, from the arguments.

    Raises:
        Mismatch: it is computed by the graph, or not positive, so that it has no root for each side.
    """
    scale = given.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(known_size(query, 3))
    if not isinstance(scale, (int, float)):
        raise Mismatch("its scale is not a number")
    if scale <= 0:
        raise Mismatch("its scale is not positive")
    return float(scale)


def _spelled_out(graph: fx.Graph, node: fx.Node) -> None:
    raise Mismatch("the model spells its attention out, with a softmax")


def _fuse(graph: fx.Graph, node: fx.Node) -> None:
    given = attention_arguments(node)
    mask = attention_mask(node)
    if not isinstance(mask, fx.Node) or not shape_of(mask) or not mask.meta["val"].is_floating_point():
        raise Mismatch("it has no mask of numbers to add")
    if same_sizes(shape_of(mask)[-1:], (1,)):
        # The operator tells by the mask how many tokens a cache in place has.
        raise Mismatch("its mask has one number for all tokens")
    query = operand(node, 0, None, "its query is no value of the graph")
    key = operand(node, 1, None, "its key is no value of the graph")
    value = operand(node, 2, None, "its value is no value of the graph")
    heads = known_size(query, 1)
    keys, values = _stream(key, heads), _stream(value, heads)
    # The caches' lengths are symbols of their own; what is appended to them tells.
    check_not_broadcast(query, keys.new, values.new)
    if keys.heads != values.heads or heads % keys.heads:
        raise Mismatch(f"{heads} heads cannot share {keys.heads} keys and {values.heads} values")
    scale = attention_scale(given, query)
    for stream in (keys, values):
        expected = {node, stream.reader}
        readers = [user for user in stream.joined.users if user.op != "output" and user not in expected]
        if readers:
            raise Mismatch(f"the longer cache is read by {readers[0].name} too")
    with graph.inserting_before(node):
        flat = [heads_last(graph, value) for value in (query, keys.new, values.new)]
        call = graph.call_function(
            decoder_ops.cached_attention,
            (*flat, mask, keys.past, values.past, heads, keys.heads, scale),
        )
        output, *caches = (graph.call_function(operator.getitem, (call, index)) for index in range(3))
        size = known_size(values.joined, 3)
        output.meta["val"] = flat[0].meta["val"].new_empty((*shape_of(flat[0])[:2], heads * size))
        by_head = heads_first(graph, output, heads)
    replace_result(node, by_head, output)
    for stream, cache in zip((keys, values), caches, strict=True):
        cache.meta = dict(stream.joined.meta)
        stream.joined.replace_all_uses_with(cache, delete_user_cb=lambda user: user.op == "output")
    # It may draw random numbers (dropout), so the elimination of dead code would let it stand.
    graph.erase_node(node)


def _stream(value: fx.Node, heads: int) -> _Stream:
    """Follow keys or values back through repeated heads to the cache they were joined into."""
    reader = None
    node = skip_copies(value)
    if node is not value:
        reader = value
    if node.target in RESHAPES:
        flat = node
        expanded = skip_copies(operand(flat, 0, None, "its keys or values are no cache"))
        if expanded.target is not _aten.expand.default:
            raise Mismatch("its keys or values are reshaped in a way that does not repeat heads")
        inserted = skip_copies(operand(expanded, 0, None, "its keys or values are no cache"))
        if inserted.target is not _aten.unsqueeze.default or inserted.args[1] != 2:
            raise Mismatch("its keys or values are expanded, but not head by head")
        reader = inserted
        node = operand(inserted, 0, None, "its keys or values are no cache")
        while node.target is not _aten.cat.default and skip_copies(node) is not node:
            reader, node = node, operand(node, 0, None, "")
    elif reader is not None:
        while reader.args[0] is not node:
            reader = operand(reader, 0, None, "")
    parts = node.args[0] if node.target is _aten.cat.default else None
    axis = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or axis not in (2, -2):
        raise Mismatch("its keys or values are not a past followed by new ones")
    past, new = parts
    if not isinstance(past, fx.Node) or past.op != "placeholder" or not isinstance(new, fx.Node):
        raise Mismatch("the past of its keys or values is not an input of the graph")
    return _Stream(node, past, new, known_size(node, 1), reader)


def replace_result(node: fx.Node, by_head: fx.Node, flat: fx.Node) -> None:
    """Let users of an attention's result ``node`` read ``by_head``, or ``flat`` where they read it heads last anyway."""
    for user in list(node.users):
        turned = user
        while turned.target in RESHAPES and len(turned.users) == 1:
            if not same_sizes(shape_of(turned), shape_of(node)):
                break
            turned = next(iter(turned.users))
        if is_transpose(turned, 1, 2):
            for last in list(turned.users):
                merged = last
                if merged.target in (_aten.contiguous.default, _aten.clone.default) and len(merged.users) == 1:
                    merged = next(iter(merged.users))
                reshaped = merged.target in RESHAPES or merged.target is _aten.flatten.using_ints
                if reshaped and same_sizes(shape_of(merged), shape_of(flat)):
                    merged.replace_all_uses_with(flat)
    node.replace_all_uses_with(by_head)
