"""Keeps the key/value cache in a narrower type than the arithmetic: a long context costs half the memory, and half the time to
read it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..kernels import decoder_ops
from .base import Pass, PassContext, PassResult
from .count_cached_tokens import past_inputs

_TO = torch.ops.aten._to_copy.default
_SIZE = torch.ops.aten.sym_size.int
_PASTS = slice(4, 6)  # arguments of cached_attention


class NarrowCache(Pass):
    """Past keys and values come in as ``dtype``, and all outputs but the first, which are the longer cache, go out as it.

    ``claq::cached_attention`` reads and makes such a cache itself: its new keys and values are rounded first. Around everything
    else that does, casts are put.
    """

    name = "narrow_cache"
    doc = "Keeps the key/value cache in 16 bits."

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        graph = gm.graph
        pasts = past_inputs(graph)
        if not pasts:
            return PassResult(gm, False, ("there is no cache",))
        wide = pasts[0].meta["val"].dtype
        with graph.inserting_before(_inputs_end(graph)):
            for past in pasts:
                readers = [user for user in past.users if not (_reads_cache(user, pasts) or user.target is _SIZE)]
                past.meta["val"] = past.meta["val"].to(self.dtype)
                if readers:
                    widened = self._cast(graph, past, wide)
                    for user in readers:
                        user.replace_input_with(past, widened)
        output = next(node for node in graph.nodes if node.op == "output")
        logits, *presents = output.args[0]
        output.args = ((logits, *(self._present(graph, present, pasts, output, wide) for present in presents)),)
        return PassResult(gm, True, (f"{len(pasts)} keys and values in {str(self.dtype).removeprefix('torch.')}",))

    def _present(
        self, graph: fx.Graph, node: fx.Node, pasts: list[fx.Node], output: fx.Node, wide: torch.dtype
    ) -> fx.Node:
        """What is returned in the place of a key or value."""
        if node.target is not operator.getitem or not _reads_cache(node.args[0], pasts):
            with graph.inserting_before(output):
                return self._cast(graph, node, self.dtype)
        node.meta["val"] = node.meta["val"].to(self.dtype)
        readers = [user for user in node.users if user is not output]
        if readers:  # further layers that attend to the same keys
            with graph.inserting_after(node):
                widened = self._cast(graph, node, wide)
            for user in readers:
                user.replace_input_with(node, widened)
        return node

    def _cast(self, graph: fx.Graph, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        cast = graph.call_function(_TO, (value,), {"dtype": dtype})
        cast.meta["val"] = value.meta["val"].to(dtype)
        return cast


def _inputs_end(graph: fx.Graph) -> fx.Node:
    """What follows the last input."""
    return [node for node in graph.nodes if node.op == "placeholder"][-1].next


def _reads_cache(node: Any, pasts: list[fx.Node]) -> bool:
    """Whether this is an attention to inputs of the graph: then both are of the cache's type."""
    return (
        isinstance(node, fx.Node)
        and node.target is decoder_ops.cached_attention
        and all(past in pasts for past in node.args[_PASTS])
    )
