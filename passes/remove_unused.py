"""Removes dead nodes, and attributes that no node fetches."""

from __future__ import annotations

from torch import fx

from .attributes import delete_attribute
from .base import Pass, PassContext, PassResult


class RemoveUnused(Pass):
    """Dead code and parameters or buffers without a ``get_attr`` node."""

    name = "remove_unused"
    doc = "Removes dead nodes and attributes that no node fetches."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        modified = gm.graph.eliminate_dead_code()
        for node in list(gm.graph.nodes):
            if node.op == "get_attr" and not node.users:
                gm.graph.erase_node(node)
                modified = True
        used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
        notes: list[str] = []
        tensors = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
        for name, _ in tensors:
            inside_used_module = any(name.startswith(f"{target}.") for target in used)
            if name not in used and not inside_used_module:
                delete_attribute(gm, name)
                notes.append(f"removed {name}")
        return PassResult(gm, modified or bool(notes), tuple(notes))
