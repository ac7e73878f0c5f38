"""Puts quantized layers in the place of planned linears and embeddings: one ``claq::linear`` or ``claq::embedding`` node a
use, tensors as buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from ..format.layer import TENSOR_NAMES, QuantizedLinear
from ..kernels import ops
from .attributes import fetch, get_attribute, has_attribute, release, set_tensor
from .base import ContractError, Pass, PassContext, PassResult
from .canonicalize_linears import stored_name
from .plan import LinearSite

NO_BIAS = "claq_no_bias"
"""Buffer of length zero that stands for the bias of layers without one, and gives the dtype of an embedding's rows; one a
dtype, the dtype's name appended."""


class ReplaceLinears(Pass):
    """Rewrites each node of the given sites; weights that no node uses any more leave the module, so memory falls.

    The tensors of site ``a.b`` are buffers ``a.b.codes``, ``a.b.codebook``, ... . A bias stays the parameter it was.

    Args:
        layers: site name -> quantized layer; sites of the plan that are missing here stay as they are.
        accuracy_level: the operator's arithmetic, see ``docs/format.md``.
    """

    name = "replace_linears"
    doc = (
        "Replaces planned linears and embeddings by claq::linear and claq::embedding, the quantized tensors as buffers."
    )

    def __init__(self, layers: Mapping[str, QuantizedLinear], accuracy_level: int = 0) -> None:
        self._layers = layers
        self._accuracy_level = accuracy_level

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        plan = context.plan
        if plan is None:
            raise ContractError("there is no plan; select_linears goes first")
        unknown = sorted(set(self._layers) - {site.name for site in plan.sites})
        if unknown:
            raise ContractError(f"layer {unknown[0]!r} is no site of the plan")
        notes: list[str] = []
        for site in plan.sites:
            layer = self._layers.get(site.name)
            if layer is None:
                notes.append(f"{site.name} has no quantized layer and stays as it is")
                continue
            if (layer.out_features, layer.in_features) != (site.out_features, site.in_features):
                raise ContractError(
                    f"layer {site.name} is [{layer.out_features}, {layer.in_features}], "
                    f"the site is [{site.out_features}, {site.in_features}]"
                )
            self._replace(gm, site, layer)
        return PassResult(gm, bool(self._layers), tuple(notes))

    def _replace(self, gm: fx.GraphModule, site: LinearSite, layer: QuantizedLinear) -> None:
        device = site.weight(gm).device
        new: list[fx.Node] = []
        lookups: list[fx.Node] = []
        old_weights: list[fx.Node] = []
        for node in site.nodes:
            x, weight, bias = node.args
            assert isinstance(weight, fx.Node)
            if weight not in old_weights:
                old_weights.append(weight)
            bias_node = bias if isinstance(bias, fx.Node) else _no_bias(gm, site.dtype, device)
            with gm.graph.inserting_before(node):
                call = gm.graph.call_function(ops.linear, (x, *[bias_node] * (len(TENSOR_NAMES) + 1)))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            gm.graph.erase_node(node)
            new.append(call)
        for node in site.lookups:
            table, indices = node.args[:2]
            assert isinstance(table, fx.Node)
            if table not in old_weights:
                old_weights.append(table)
            like = _no_bias(gm, site.dtype, device)
            with gm.graph.inserting_before(node):
                call = gm.graph.call_function(ops.embedding, (indices, *[like] * (len(TENSOR_NAMES) + 1)))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            gm.graph.erase_node(node)
            lookups.append(call)
        for weight in old_weights:
            release(gm, weight, stored_name(weight))
        prefix = _buffer_prefix(gm, site.name)
        fetched = []
        for name, tensor in layer.tensors().items():
            set_tensor(gm, f"{prefix}.{name}", tensor.to(device))
            fetched.append(fetch(gm.graph, f"{prefix}.{name}"))
        settings = (layer.in_features, layer.out_features, list(layer.columns))
        for call in new:
            call.args = (call.args[0], *fetched, call.args[-1], *settings, self._accuracy_level)
        for call in lookups:
            call.args = (call.args[0], *fetched, call.args[-1], *settings)
        site.nodes, site.lookups = new, lookups

    def ensures(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.op == "get_attr" and not has_attribute(gm, str(node.target)):
                raise ContractError(f"{node.name} fetches {node.target}, which is gone")


def _buffer_prefix(gm: fx.GraphModule, name: str) -> str:
    """Where the layer's buffers go: under its own name unless a tensor still stands there."""
    prefix = name
    while has_attribute(gm, prefix) and isinstance(get_attribute(gm, prefix), torch.Tensor):
        prefix += "_claq"
    return prefix


def _no_bias(gm: fx.GraphModule, dtype: torch.dtype, device: torch.device) -> fx.Node:
    target = f"{NO_BIAS}_{str(dtype).removeprefix('torch.')}"
    if not has_attribute(gm, target):
        set_tensor(gm, target, torch.zeros(0, dtype=dtype, device=device))
    return fetch(gm.graph, target)
