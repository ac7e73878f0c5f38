"""Puts quantized layers into a graph, and remembers what it was before its operators were fused, to verify that by."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from .capture import CapturedModel
from .format.layer import TENSOR_NAMES, QuantizedLinear
from .kernels.fused_ops import LAYER_OPERATORS
from .passes import PassContext, fusing_pipeline, lowering_pipeline


def lower(
    graph_module: fx.GraphModule,
    context: PassContext,
    layers: Mapping[str, QuantizedLinear],
    accuracy_level: int,
    *,
    fuse: bool,
    keep_unfused: bool = False,
) -> fx.Graph | None:
    """Put quantized layers into a graph, in place.

    Args:
        graph_module: the graph.
        context: with its plan.
        layers: quantized layers by name.
        accuracy_level: of all.
        fuse: the graph goes into a file, so operators do what is around them too.
        keep_unfused: copy the graph before they do.

    Returns:
        a copy of the graph as it was before operators were fused, for :func:`before_fusing`; None where they were not or no
        copy is wanted.
    """
    lowering_pipeline(layers, accuracy_level, for_file=fuse).run(graph_module, context)
    if not fuse:
        return None
    unfused = copy.deepcopy(graph_module.graph) if keep_unfused else None
    fusing_pipeline().run(graph_module, context)
    return unfused


def layers_in(captured: CapturedModel) -> set[str]:
    """Names of the quantized layers that a lowered model reads."""
    return {
        str(node.args[1].target).removesuffix(f".{TENSOR_NAMES[0]}")
        for node in captured.graph_module.graph.nodes
        if node.target in LAYER_OPERATORS
    }


def before_fusing(captured: CapturedModel, unfused: fx.Graph) -> CapturedModel:
    """A lowered model with the graph that :func:`lower` returned; tensors are shared."""
    return replace(captured, graph_module=fx.GraphModule(captured.graph_module, unfused))
