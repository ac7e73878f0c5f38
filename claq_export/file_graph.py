"""The graphs that go into files where they are not the one that was quantized: with a cache, or in another dtype.

They get the same layers, matched by the name of their weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .capture import CACHED, ENCODER, PAST_INPUTS, CapturedModel
from .capture.precision import inputs_in_dtype
from .deferred import is_deferred
from .errors import CaptureError
from .format.layer import TENSOR_NAMES, QuantizedLinear
from .kernels.fused_ops import LAYER_OPERATORS
from .lowering import lower
from .passes import (
    AdditiveMasks,
    FuseSiblings,
    LastLogits,
    NarrowCache,
    PassContext,
    Pipeline,
    Plan,
    decoder_pipeline,
)
from .passes.attributes import get_attribute, replace_tensor


def plan_file_graphs(
    graphs: Sequence[CapturedModel],
    plan: Plan,
    planning: Pipeline,
    fuse: bool,
    last_logits: bool = False,
    cache_dtype: torch.dtype | None = None,
) -> list[Plan]:
    """Plan the files' graphs as the quantized graph was planned, sibling linears not stacked yet.

    Args:
        graphs: the files' graphs, rewritten in place; together they have the layers of the quantized graph.
        plan: of the graph that is quantized, sibling linears stacked or not.
        planning: the passes that made that plan, but for the stacking.
        fuse: with a cache, put one operator in the place of many (attention, rotary positions, normalization).
        last_logits: with a cache, let it return the logits of the last new token alone.
        cache_dtype: of the cache, where that is not the dtype of the graph.

    Raises:
        CaptureError: the graphs do not have the same layers, or what makes the logits cannot be given one token.
    """
    cached = any(graph.cached for graph in graphs)
    wanted, found = _parts_of(plan), dict[str, int]()
    contexts = [replace(_context(graph), chosen=frozenset(wanted)) for graph in graphs]
    plans: list[Plan] = []
    for graph, context in zip(graphs, contexts, strict=True):
        if cached:
            Pipeline([AdditiveMasks()]).run(graph.graph_module, context)
        planning.run(graph.graph_module, context)
        assert context.plan is not None
        plans.append(context.plan)
    for own in plans:
        _check_same(wanted, wanted | _parts_of(own), cached)
        found |= _parts_of(own)
    _check_same(wanted, found, cached)
    for graph, context in zip(graphs, contexts, strict=True):
        if cached and last_logits:
            (record,) = Pipeline([LastLogits()]).run(graph.graph_module, context)
            if not record.modified:
                raise CaptureError(
                    f"the last token's logits cannot be had alone: {record.notes[0]}; leave --last-logits out"
                )
        if cached and fuse:
            decoder_pipeline().run(graph.graph_module, context)
        if cached and cache_dtype is not None:
            Pipeline([NarrowCache(cache_dtype)]).run(graph.graph_module, context)
            graph.example_inputs = _with_cache_in(graph.example_inputs, cache_dtype)
    return plans


def lower_file_graph(
    captured: CapturedModel,
    plan: Plan,
    layers: Mapping[str, QuantizedLinear],
    accuracy_level: int,
    *,
    keep_unfused: bool = False,
) -> fx.Graph | None:
    """Put quantized layers, single or stacked, into a file's graph, whose own plan is ``plan`` and which has some of them at
    least; with ``keep_unfused`` returns the graph before operators were fused.

    Raises:
        CaptureError: the linears that are stacked are not those of the graph that was quantized.
    """
    context = _context(captured)
    context.plan = plan
    if not layers.keys() >= {site.name for site in plan.sites}:
        Pipeline([FuseSiblings(weights=False)]).run(captured.graph_module, context)
    sizes = {site.name: site.out_features for site in plan.sites}
    layers = {name: layer for name, layer in layers.items() if name in sizes}
    _check_same({name: layer.out_features for name, layer in layers.items()}, sizes, captured.cached)
    return lower(captured.graph_module, context, layers, accuracy_level, fuse=True, keep_unfused=keep_unfused)


def share_stacked_weights(captured: CapturedModel, own: Plan, plan: Plan, graph_module: fx.GraphModule) -> None:
    """Let the file's graph read its weights from the stacks that were made of them, so that each is in memory once.

    Args:
        captured: the file's graph.
        own: its plan, nothing stacked.
        plan: of the graph that is quantized.
        graph_module: that graph.
    """
    sites = {site.name: site for site in own.sites}
    for stack in plan.sites:
        weight = stack.weight(graph_module)
        if len(stack.parts) == 1 or is_deferred(weight) or stack.dtype != captured.dtype:
            continue
        if not sites.keys() >= {part for part, _ in stack.parts}:
            continue  # another file's
        rows = weight.detach().split([size for _, size in stack.parts])
        for (part, _), some in zip(stack.parts, rows, strict=True):
            parameter = nn.Parameter(some, requires_grad=False)
            replace_tensor(captured.graph_module, sites[part].weight_target, parameter)


def release_weights(captured: CapturedModel, plan: Plan) -> None:
    """Let go of the dense weights that quantized layers will replace; shapes and dtypes stay."""
    for site in plan.sites:
        site.release_weight(captured.graph_module)


def in_float32(captured: CapturedModel, exact: CapturedModel) -> CapturedModel:
    """A lowered graph of another dtype, or with a cache of one, with everything in float32: what its rounding is measured by.

    Args:
        captured: the file's graph.
        exact: the graph that was quantized; where its tensors are those of ``captured`` before the cast, they are used.
    """
    gm = captured.graph_module
    dtype = captured.dtype if captured.dtype != torch.float32 else captured.cache_dtype
    graph = copy.deepcopy(gm.graph)
    kept = _format_tensors(graph)
    wide = fx.GraphModule(gm, graph)
    originals = {**dict(exact.graph_module.named_parameters()), **dict(exact.graph_module.named_buffers())}
    for target in sorted({str(node.target) for node in graph.nodes if node.op == "get_attr" and node not in kept}):
        tensor = get_attribute(wide, target)
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
            continue
        original = originals.get(target)
        same = original is not None and original.shape == tensor.shape and torch.equal(original.to(dtype), tensor)
        replace_tensor(wide, target, original.detach() if same and original is not None else tensor.detach().float())
    for node in graph.nodes:
        node.args, node.kwargs = _map_dtype(node.args, dtype), _map_dtype(node.kwargs, dtype)
    wide.recompile()
    return replace(
        captured,
        graph_module=wide,
        example_inputs=inputs_in_dtype(dict(captured.example_inputs), torch.float32),
        dtype=torch.float32,
    )


def _with_cache_in(inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if name.startswith(PAST_INPUTS) else value for name, value in inputs.items()}


def _context(captured: CapturedModel) -> PassContext:
    # What an encoder ends with is no head.
    task = "feature-extraction" if captured.part == ENCODER else (captured.task or "").removesuffix(CACHED) or None
    return PassContext(task=task, aliases=captured.aliases)


def _format_tensors(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that fetch tensors of the claq format, whose dtypes are the format's."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in LAYER_OPERATORS:
            found.update(value for value in node.args[1 : 1 + len(TENSOR_NAMES)] if isinstance(value, fx.Node))
    return found


def _map_dtype(arguments: Any, dtype: torch.dtype) -> Any:
    if isinstance(arguments, torch.dtype):
        return torch.float32 if arguments == dtype else arguments
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_map_dtype(value, dtype) for value in arguments)
    if isinstance(arguments, Mapping):
        return {key: _map_dtype(value, dtype) for key, value in arguments.items()}
    return arguments


def _parts_of(plan: Plan) -> dict[str, int]:
    return {name: rows for site in plan.sites for name, rows in site.parts}


def _check_same(wanted: Mapping[str, int], found: Mapping[str, int], cached: bool) -> None:
    """Layer names and rows of the graph that is quantized and of the file's."""
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if different:
        how = (
            "the graphs with and without cache differ in layer {}; the model can be exported without cache (--no-cache)"
            if cached
            else "the graphs in float32 and in the file's dtype differ in layer {}; leave out --dtype"
        )
        raise CaptureError(how.format(f"{different[0]!r} ({len(different)} in all)"))
