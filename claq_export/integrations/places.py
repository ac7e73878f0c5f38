"""Where the layers of a checkpoint go in a transformers model: modules by name, and those that are tied to one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import ModelError
from ..experts import matrix_of_stack
from ..modules import ClaqEmbedding, ClaqLinear, hollow_embedding, linear_kind
from .sharing import other_names
from .weights import LayerFiles


class Place:
    """Rows of a layer and the module of a model that they belong to.

    Args:
        target: name of the module.
        start, stop: rows of the layer.
        owner: the dense module, without memory.
    """

    def __init__(self, target: str, start: int, stop: int, owner: nn.Module) -> None:
        self.target, self.start, self.stop = target, start, stop
        self.owner = owner
        self.module: ClaqLinear | ClaqEmbedding

    def hollow(self, model: nn.Module, columns: tuple[int, int, int], accuracy_level: int) -> None:
        """Put a module without tensors into the model.

        Raises:
            ModelError: the dense module has another number of rows.
        """
        weight = self.owner.weight
        assert isinstance(weight, torch.Tensor)
        kind = linear_kind(self.owner)
        shape = tuple(weight.shape)[::-1] if kind == "Conv1D" else tuple(weight.shape)
        rows, in_features = shape
        if rows != self.stop - self.start:
            raise ModelError(
                f"{self.target!r} has {rows} output features in the model, {self.stop - self.start} in the files"
            )
        if kind == "Embedding":
            assert isinstance(self.owner, nn.Embedding)
            self.module = hollow_embedding(self.owner, columns)
        else:
            bias = self.owner.bias if isinstance(self.owner.bias, torch.Tensor) else None
            self.module = ClaqLinear.hollow(in_features, rows, columns, bias, accuracy_level)
            self.module.transposed = kind == "Conv1D"
        model.set_submodule(self.target, self.module)


def spellings(model: Any, name: str) -> tuple[str, ...]:
    """The names that a tensor or module ``name`` of the model may have in files, or one of the files in the model: a base
    model's names lack the prefix that a model with a head has."""
    prefix = f"{model.base_model_prefix}."
    return tuple(dict.fromkeys((name, name.removeprefix(prefix), prefix + name)))


def find_places(model: Any, layers: LayerFiles) -> dict[str, list[Place]]:
    """Layer -> where its rows go. A layer of which the model has no module (a head, for a bare model) is left out.

    A module that the model ties to one of these modules, and whose weight is in no file, is a place of its layer too: the
    head of a model that is loaded from the folder of a bare one.

    Raises:
        ModelError: a module is not a plain linear, or no layer fits the model at all.
    """
    found: dict[str, list[Place]] = {}
    for name in layers.entries:
        start = 0
        parts = [(part, rows, True) for part, rows in layers.parts(name)]
        parts += [(other, parts[0][1], False) for other in layers.tied(name)]
        for part, rows, follows in parts:
            for target in spellings(model, part):
                owner = _submodule(model, target)
                if owner is not None:
                    break
            if owner is None and any(matrix_of_stack(model, target) for target in spellings(model, part)):
                raise ModelError(
                    f"{part!r} is a matrix of a stack that {type(model).__name__} uses in its own way; load the folder with "
                    "claq_export.load instead"
                )
            if not follows:
                start = 0  # all rows once more, under another name
            stop = start + rows
            if owner is not None:
                if linear_kind(owner) is None:
                    raise ModelError(
                        f"{target!r} is a {type(owner).__name__} in transformers {transformers.__version__}, not a plain "
                        "linear or embedding module; load the folder with claq_export.load instead"
                    )
                found.setdefault(name, []).append(Place(target, start, stop, owner))
            start = stop
    if not found:
        some = ", ".join(list(layers.entries)[:3])
        raise ModelError(f"{type(model).__name__} has none of the quantized layers ({some}, …)")
    taken = {place.target for places in found.values() for place in places}
    others = other_names(model)
    for places in found.values():
        places += _tied_places(model, layers, places, taken, others)
    return found


def _tied_places(
    model: Any, layers: LayerFiles, places: list[Place], taken: set[str], others: Mapping[str, list[str]]
) -> list[Place]:
    """A place for each module that shares a weight with one of ``places``, is none of ``taken`` and not in the files."""
    tied = []
    for place in places:
        for name in (name.removesuffix(".weight") for name in others.get(f"{place.target}.weight", ())):
            module = _submodule(model, name)
            if name not in taken and linear_kind(module) and not layers.holds(spellings(model, f"{name}.weight")):
                assert module is not None
                tied.append(Place(name, place.start, place.stop, module))
                taken.add(name)
    return tied


def possible_targets(model: Any, layers: LayerFiles) -> list[str]:
    """The names that quantized linears may have in the model."""
    parts = [part for name in layers.entries for part, _ in layers.parts(name)]
    return [target for part in parts for target in spellings(model, part)]


def _submodule(model: nn.Module, target: str) -> nn.Module | None:
    try:
        return model.get_submodule(target)
    except AttributeError:
        return None
