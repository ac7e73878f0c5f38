"""Parameters and buffers of a GraphModule under dotted names: read, write, remove, and nodes that fetch them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn


def get_attribute(gm: nn.Module, target: str) -> Any:
    """The object under a dotted name."""
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def has_attribute(gm: nn.Module, target: str) -> bool:
    """Whether there is anything under a dotted name."""
    value: Any = gm
    for part in target.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def set_tensor(gm: nn.Module, target: str, tensor: torch.Tensor) -> None:
    """Register a parameter (as given) or else a buffer under a dotted name; modules on the way are made.

    Raises:
        ValueError: something that is not a module stands on the way, or the name is taken.
    """
    *path, leaf = target.split(".")
    owner = gm
    for name in path:
        child = owner._modules.get(name)
        if child is None:
            if hasattr(owner, name):
                raise ValueError(f"{target}: {name} is not a module")
            child = nn.Module()
            owner.add_module(name, child)
        owner = child
    if hasattr(owner, leaf):
        raise ValueError(f"{target} exists already")
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def delete_attribute(gm: nn.Module, target: str) -> None:
    """Remove what is under a dotted name, and the modules on the way that are empty then."""
    *path, leaf = target.split(".")
    owners = [gm]
    for name in path:
        owners.append(owners[-1].get_submodule(name))
    delattr(owners[-1], leaf)
    for depth in range(len(path), 0, -1):
        owner = owners[depth]
        if owner._parameters or owner._buffers or owner._modules:
            return
        delattr(owners[depth - 1], path[depth - 1])


def replace_tensor(gm: nn.Module, target: str, tensor: torch.Tensor) -> None:
    """Put a parameter (as given) or else a buffer in the place of what is under a dotted name."""
    delete_attribute(gm, target)
    set_tensor(gm, target, tensor)


def free_name(gm: nn.Module, target: str) -> str:
    """``target``, or ``target`` with the first number that makes it unused."""
    candidate, number = target, 2
    while has_attribute(gm, candidate):
        candidate, number = f"{target}_{number}", number + 1
    return candidate


def fetch(graph: fx.Graph, target: str) -> fx.Node:
    """The ``get_attr`` node of ``target``: the present one if it stands at the graph's head, else a new one there."""
    first: fx.Node = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    head: fx.Node
    for head in graph.nodes:
        if head is first:
            break
        if head.op == "get_attr" and head.target == target:
            return head
    with graph.inserting_before(first):
        return graph.get_attr(target)


def release(gm: fx.GraphModule, node: fx.Node, *also: str) -> None:
    """Remove an unused ``get_attr`` node, with its attribute and those in ``also`` unless other nodes fetch them."""
    if node.users:
        return
    gm.graph.erase_node(node)
    fetched = {str(other.target) for other in gm.graph.nodes if other.op == "get_attr"}
    for target in {str(node.target), *also} - fetched:
        if has_attribute(gm, target):
            delete_attribute(gm, target)
