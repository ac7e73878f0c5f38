"""The node-major walk: run each operator of the captured graph once for every calibration batch, then go on.

When the walk reaches a linear layer its inputs for all batches are at hand, computed by layers that are quantized
already (GPTQ's "true sequential"); what the visitor returns as its weight is what the rest of the graph sees. No
architecture needs a class of its own. A value is dropped after its last use, and an operator whose arguments are the
same objects for two batches (a mask, a position table) runs once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import CalibrationError
from ..passes.attributes import get_attribute
from .data import Batch

LinearVisitor = Callable[[fx.Node, Sequence[torch.Tensor]], torch.Tensor | None]
"""Called with a linear node and its input for each batch; returns the weight ``[N, K]`` to go on with, None to keep
it."""


def ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and everything they depend on."""
    needed: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed


def _identity(value: Any) -> Any:
    """A hashable key that is equal for two arguments only if they are the same object or equal plain values."""
    if isinstance(value, (tuple, list)):
        return tuple(_identity(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _identity(item)) for key, item in value.items())
    if isinstance(value, slice):
        return ("slice", _identity(value.start), _identity(value.stop), _identity(value.step))
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return (type(value), value)
    return id(value)


def _is_mutable(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


class NodeWalk:
    """One walk over a graph module of aten operators, for a list of batches.

    Args:
        graph_module: unlifted graph (parameters are ``get_attr`` nodes).
        batches: inputs by name; names and order are those of the graph's placeholders.
        stop_at: linear nodes the visitor is called for; nothing that they do not depend on is computed.

    Raises:
        CalibrationError: the batches do not have the graph's inputs, or an operator fails on them.
    """

    def __init__(self, graph_module: fx.GraphModule, batches: Sequence[Batch], stop_at: Sequence[fx.Node]) -> None:
        self._module = graph_module
        self._batches = batches
        self._linears = set(stop_at)
        needed = ancestors(stop_at)
        self._nodes = [node for node in graph_module.graph.nodes if node in needed]
        self._last_use = self._find_last_uses()
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        names = list(batches[0]) if batches else []
        if len(names) != len(placeholders):
            raise CalibrationError(
                f"the model takes {len(placeholders)} inputs, the calibration batches have {len(names)}: {', '.join(names)}"
            )
        self._input_name = dict(zip(placeholders, names, strict=True))

    def _find_last_uses(self) -> Mapping[fx.Node, list[fx.Node]]:
        """For each node, the values that nothing after it needs."""
        dead_after: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self._nodes):
            for argument in (node, *node.all_input_nodes):
                if argument not in seen:
                    seen.add(argument)
                    dead_after.setdefault(node, []).append(argument)
        return dead_after

    @torch.no_grad()
    def run(self, visit: LinearVisitor) -> None:
        """Walk the graph, calling ``visit`` at each linear node of ``stop_at`` in topological order."""
        values: dict[fx.Node, list[Any]] = {}
        for node in self._nodes:
            values[node] = self._evaluate(node, values, visit)
            for dead in self._last_use.get(node, ()):
                del values[dead]

    def _evaluate(self, node: fx.Node, values: Mapping[fx.Node, list[Any]], visit: LinearVisitor) -> list[Any]:
        if node.op == "placeholder":
            return [batch[self._input_name[node]] for batch in self._batches]
        if node.op == "get_attr":
            return [get_attribute(self._module, str(node.target))] * len(self._batches)
        if node in self._linears:
            return self._evaluate_linear(node, values, visit)
        function = self._callable(node)
        mutable = _is_mutable(node.target)
        results: list[Any] = []
        memo: dict[Any, Any] = {}
        for index in range(len(self._batches)):
            args, kwargs = self._arguments(node, values, index)
            if mutable:
                # An in-place operator must not write into a value that another batch or node shares.
                args, kwargs = fx.node.map_aggregate((args, kwargs), _clone)
            key = (_identity(args), _identity(kwargs))
            if mutable or key not in memo:
                try:
                    memo[key] = function(*args, **kwargs)
                except RuntimeError as error:
                    raise CalibrationError(
                        f"operator {node.format_node() or node.name} fails on calibration batch {index}: {error}"
                    ) from error
            results.append(memo[key])
        return results

    def _evaluate_linear(self, node: fx.Node, values: Mapping[fx.Node, list[Any]], visit: LinearVisitor) -> list[Any]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        weight = visit(node, values[source])
        results, memo = [], {}
        for index in range(len(self._batches)):
            (x, original, *rest), _ = self._arguments(node, values, index)
            bias: Any = rest[0] if rest else node.kwargs.get("bias")
            if isinstance(bias, fx.Node):
                bias = values[bias][index]
            if id(x) not in memo:
                memo[id(x)] = torch.nn.functional.linear(x, original if weight is None else weight.to(x.dtype), bias)
            results.append(memo[id(x)])
        return results

    def _callable(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_function" and callable(node.target):
            return node.target
        if node.op == "call_module":
            return self._module.get_submodule(str(node.target))
        raise CalibrationError(f"graph node {node.format_node()} is not an operator of a captured graph")

    def _arguments(self, node: fx.Node, values: Mapping[fx.Node, list[Any]], index: int) -> tuple[Any, Any]:
        return (
            fx.node.map_arg(node.args, lambda argument: values[argument][index]),
            fx.node.map_arg(node.kwargs, lambda argument: values[argument][index]),
        )


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
