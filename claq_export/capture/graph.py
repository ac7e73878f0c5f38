"""From an ``ExportedProgram`` to a plain GraphModule: flat signature, original parameter names, no guards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx.graph import CodeGen

_CHECKS = (
    "aten::_assert_tensor_metadata",
    "aten::_assert_async",
    "aten::_assert_scalar",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
)


def unlift(exported: torch.export.ExportedProgram, prefix: str, input_names: Sequence[str]) -> torch.fx.GraphModule:
    """The graph with its parameters as attributes.

    Args:
        exported: the program.
        prefix: taken off the names of parameters and buffers (the path of the user's model inside the traced one).
        input_names: names of the arguments of the result's ``forward``, in order.

    Returns:
        a GraphModule that shares parameters with the traced module, returns a tensor or a tuple of tensors, and has
        neither guards nor assertions, which would tie it to the sizes it was traced with.
    """
    unlifted = exported.module()
    assert isinstance(unlifted, torch.fx.GraphModule)
    graph = unlifted.graph
    _inline_regions(unlifted)
    for node in reversed(list(graph.nodes)):
        if is_check(node):
            graph.erase_node(node)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, input_names, strict=True):
        node.target = name
        node._rename(name)
        node.args = ()
    output = next(node for node in graph.nodes if node.op == "output")
    values = output.args[0]
    if isinstance(values, (tuple, list)):
        output.args = (values[0] if len(values) == 1 else tuple(values),)
    graph.set_codegen(CodeGen())
    graph.eliminate_dead_code()

    root = nn.Module()
    transient: list[str] = []
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        value, persistent = _attribute(unlifted, node.target)
        node.target = node.target.removeprefix(prefix)
        set_attribute(root, node.target, value)
        if not persistent:
            transient.append(node.target)
    result = torch.fx.GraphModule(root, graph, class_name=type(unlifted).__name__)
    for target in transient:
        path, _, leaf = target.rpartition(".")
        result.get_submodule(path)._non_persistent_buffers_set.add(leaf)
    result.eval()
    return result


def _inline_regions(module: torch.fx.GraphModule) -> None:
    """Put the contents of ``no_grad`` regions and of regions with autocast switched off in the place of their calls."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            region, arguments = node.args[1], node.args[2:]
        elif node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is False:
            region, arguments = node.args[4], node.args[5:]
        else:
            continue
        body = module.get_submodule(str(region.target))
        assert isinstance(body, torch.fx.GraphModule)
        _inline_regions(body)
        body.graph.eliminate_dead_code()
        body.recompile()
        inner = [inside for inside in body.graph.nodes if inside.op == "placeholder"]
        values = dict(zip(inner, arguments, strict=True))
        # A region with attributes of its own (other regions, constants) stays a call.
        if any(inside.op == "get_attr" for inside in body.graph.nodes):
            continue
        with graph.inserting_before(node):
            results = graph.graph_copy(body.graph, values)
        for user in list(node.users):
            # A region returns a tuple, of which getitem nodes pick.
            assert isinstance(results, (tuple, list))
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)


def writes_in_place(module: torch.fx.GraphModule) -> bool:
    """Whether an operator of the graph, or of a region in it, writes into one of its arguments."""
    graphs = [part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
    schemas = [getattr(node.target, "_schema", None) for graph in graphs for node in graph.nodes]
    return any(schema is not None and schema.is_mutable for schema in schemas)


def is_check(node: torch.fx.Node) -> bool:
    """Whether the node only checks sizes, dtypes or values."""
    if node.op == "call_module":
        return str(node.target).startswith("_guards")
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name in _CHECKS


def _attribute(module: nn.Module, target: str) -> tuple[Any, bool]:
    path, _, leaf = target.rpartition(".")
    owner = module.get_submodule(path)
    return getattr(owner, leaf), leaf not in owner._non_persistent_buffers_set


def set_attribute(root: nn.Module, target: str, value: Any) -> None:
    """Put a parameter, buffer, module or constant under a dotted name, making the modules on the way."""
    *path, leaf = target.split(".")
    owner = root
    for name in path:
        child = owner._modules.get(name)
        if child is None:
            child = nn.Module()
            owner.add_module(name, child)
        owner = child
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    elif isinstance(value, torch.Tensor):
        owner.register_buffer(leaf, value)
    else:
        setattr(owner, leaf, value)
