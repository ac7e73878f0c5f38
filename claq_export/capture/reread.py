"""Lets go of weights that a model's files give again.

A model is loaded and captured with all its values, as transformers and torch.export do it. From there on a large weight is
needed for moments only, so each one that is what its file holds, value for value, becomes a stand-in
(:mod:`claq_export.deferred`). Whatever transformers made of several tensors, or changed, stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx, nn

from ..deferred import DEFER_FROM, is_deferred, logical_bytes, materialize, stand_in
from ..inputs import SafetensorsFile
from ..passes.attributes import get_attribute, replace_tensor
from ..process_memory import collect_garbage
from .lazy import StoredParameter, files_by_tensor, parameter_slots, stored_names
from .tasks import TaskModel

_Identity = tuple[int, tuple[int, ...], tuple[int, ...]]


def let_go_of_weights(model: TaskModel, graphs: Sequence[fx.GraphModule]) -> None:
    """Put stand-ins in the place of a model's large weights, where its files hold the same values.

    Args:
        model: as a loader returned it, with its ``source``.
        graphs: captured from it; they get the same stand-ins.
    """
    files = files_by_tensor(model.source.files if model.source is not None else ())
    stored = stored_names(model.model, files)
    targets = [_targets_by_identity(graph) for graph in graphs]
    made: dict[_Identity, nn.Parameter | None] = {}
    for name, owner, leaf, parameter in parameter_slots(model.model):
        identity = _identity(parameter)
        if identity not in made:
            made[identity] = _stand_in_for(parameter, files, stored.get(name), name)
        replacement = made[identity]
        if replacement is None:
            continue
        owner._parameters[leaf] = replacement
        for graph, found in zip(graphs, targets, strict=True):
            for target in found.pop(identity, ()):
                replace_tensor(graph, target, replacement)
    collect_garbage()


@contextmanager
def weights_in_memory(graphs: Sequence[fx.GraphModule]) -> Iterator[None]:
    """Inside the block graphs have the values of all their weights; afterwards the stand-ins are back."""
    stand_ins = [
        (graph, target, tensor)
        for graph in graphs
        for targets in _targets_by_identity(graph).values()
        for target in targets
        if is_deferred(tensor := get_attribute(graph, target))
    ]
    restore_weights(graphs)
    try:
        yield
    finally:
        for graph, target, tensor in stand_ins:
            replace_tensor(graph, target, tensor)
        collect_garbage()


def restore_weights(graphs: Sequence[fx.GraphModule]) -> None:
    """Read the values of all stand-ins that graphs still fetch; one that several of them share is in memory once."""
    read: dict[_Identity, nn.Parameter] = {}
    for graph in graphs:
        for identity, targets in _targets_by_identity(graph).items():
            tensor = get_attribute(graph, targets[0])
            if is_deferred(tensor):
                if identity not in read:
                    read[identity] = nn.Parameter(materialize(tensor.detach()), requires_grad=False)
                for target in targets:
                    replace_tensor(graph, target, read[identity])


def _stand_in_for(
    parameter: torch.Tensor, files: dict[str, SafetensorsFile], source: str | None, name: str
) -> nn.Parameter | None:
    """A stand-in that reads ``source`` from its file; None where that is not the parameter, or not worth it."""
    if source is None or is_deferred(parameter) or logical_bytes(parameter) < DEFER_FROM:
        return None
    stored = StoredParameter(files[source], source, parameter.dtype, name)
    if not stored.gives(parameter):
        return None
    values = stand_in(parameter.shape, parameter.dtype, stored.load, stored.load_matrix)
    return nn.Parameter(values, requires_grad=False)


def _targets_by_identity(graph: fx.GraphModule) -> dict[_Identity, list[str]]:
    """Where a graph fetches each tensor from."""
    found: dict[_Identity, list[str]] = {}
    for target in dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr"):
        tensor = get_attribute(graph, target)
        if isinstance(tensor, torch.Tensor):
            found.setdefault(_identity(tensor), []).append(target)
    return found


def _identity(tensor: torch.Tensor) -> _Identity:
    """Equal for tensors that share memory, shape and layout."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
