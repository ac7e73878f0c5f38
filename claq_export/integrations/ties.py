"""Tensors that several modules of a transformers model share, of which a file holds one: heads, their biases, aliases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..format.checkpoint import find_aliases
from ..format.layer import TENSOR_NAMES
from ..modules import ClaqEmbedding, ClaqLinear, linear_kind
from .places import Place, spellings
from .sharing import other_names
from .weights import LayerFiles

Quantized = ClaqLinear | ClaqEmbedding
"""A module whose weight is quantized."""


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Every quantized module under each of its names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (ClaqLinear, ClaqEmbedding)):
            yield name, module


def groups_by_codes(model: nn.Module) -> list[list[tuple[str, Quantized]]]:
    """The quantized modules, those that share their codes together, a linear first if there is one, as in exports."""
    groups: dict[tuple[torch.device, int], list[tuple[str, Quantized]]] = {}
    for name, module in quantized_modules(model):
        groups.setdefault((module.codes.device, module.codes.data_ptr()), []).append((name, module))
    return [sorted(members, key=lambda member: isinstance(member[1], ClaqEmbedding)) for members in groups.values()]


def shared_tensors(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Tensors that are the very memory of another one -> the name of that, which a file needs to hold alone.

    Args:
        model: whose ``state_dict()`` is ``state``. Tensors of quantized weights are left to their layers.
    """
    modules = dict(quantized_modules(model))
    # A parameter of the model comes before a quantized module's bias that repeats it.
    order = sorted(state, key=lambda name: name.rpartition(".")[0] in modules)

    def of_a_layer(name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return owner in modules and leaf in TENSOR_NAMES

    return find_aliases((name, state[name]) for name in order if not state[name].is_meta and not of_a_layer(name))


class SharedTensors:
    """The tensors, outside of quantized weights, of which a model or its files have several names, while it is loaded.

    Args:
        model: with its dense modules still.
        layers: the files.
        places: where quantized modules will be.
    """

    def __init__(self, model: Any, layers: LayerFiles, places: Sequence[Place]) -> None:
        self._layers = layers
        biases = [f"{place.target}.bias" for place in places if linear_kind(place.owner) != "Embedding"]
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._biases = [name for name in biases if name in known]
        known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self._links: dict[str, str] = {}
        for alias, stored in layers.aliases.items():
            target = next((name for name in spellings(model, alias) if name in known), None)
            source = next((name for name in spellings(model, stored) if name in known), None)
            if target is not None and source is not None:
                self._link(model, target, source)
        self._others = other_names(model)
        for name in self._biases:
            for other in self._others.get(name, ()):
                self._link(model, name, other)

    def _link(self, model: Any, target: str, source: str) -> None:
        """Note that ``target`` takes its values from ``source``, or the other way round where only that is stored."""
        here, there = (self._layers.holds(spellings(model, name)) for name in (target, source))
        if here and not there:
            target, source = source, target
        if not (here and there) and target not in self._links and self._links.get(source) != target:
            self._links[target] = source

    def has_tied_bias(self, place: Place) -> bool:
        """Whether the dense module's bias is another parameter of the model too."""
        return bool(self._others.get(f"{place.target}.bias"))

    @property
    def given(self) -> list[str]:
        """Names that no file needs to hold."""
        return list(self._links)

    def settle(self, model: Any) -> None:
        """Give every tensor that is in no file its values; a bias that nothing tells is zero."""
        for name in self._biases:
            if name not in self._links and not self._layers.holds(spellings(model, name)):
                # Whatever was in memory would be there otherwise; transformers has told that it is missing.
                _tensor(model, name).detach().zero_()
        for target, source in self._links.items():
            _share(*_owner(model, target), _tensor(model, source))


def _share(owner: nn.Module, leaf: str, value: torch.Tensor) -> None:
    """Let ``owner.leaf`` be ``value``, or have its values where that cannot be."""
    before = getattr(owner, leaf)
    if before.data_ptr() == value.data_ptr():
        return
    if before.device == value.device and isinstance(before, nn.Parameter) and isinstance(value, nn.Parameter):
        setattr(owner, leaf, value)
    elif isinstance(owner, ClaqLinear) and not isinstance(before, nn.Parameter):
        owner.bias = value.detach().to(before.device, before.dtype)
    else:
        with torch.no_grad():
            before.copy_(value)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(*_owner(model, name))
    assert isinstance(tensor, torch.Tensor)
    return tensor


def untie(model: Any) -> bool:
    """Keep transformers from tying what is quantized: codes are shared already, and a head may have its own.

    ``tie_word_embeddings`` stays as it is where head and embedding have the same codes, or the model has no head: a model
    with a head that is loaded from its files then has one that is tied.

    Returns:
        whether the configuration said that the head is tied, and does not any more.
    """
    quantized = {name for name, _ in quantized_modules(model)}

    def free(pair: tuple[str, str]) -> bool:
        return not any(name.rpartition(".")[0] in quantized for name in pair)

    # Transformers 5 has a mapping target -> source of each model, and ties by it again when asked to.
    for prefix, part in _pretrained_parts(model):
        pairs = getattr(part, "all_tied_weights_keys", None)
        if isinstance(pairs, dict):
            kept = {a: b for a, b in pairs.items() if free((prefix + a, prefix + b))}
            if len(kept) < len(pairs):
                part.all_tied_weights_keys, part._tied_weights_keys = kept, dict(kept)
    if _head_is_tied(model):
        return False
    was_tied = any(config.tie_word_embeddings for config in _configs(model))
    for config in _configs(model):
        config.tie_word_embeddings = False
    return was_tied


def tie_bare(model: Any) -> bool:
    """Let the configuration of a model without a head say that heads are tied to its embedding, if it has none.

    Returns:
        whether it does.
    """
    if _ends(model)[1] is not None:
        return False
    for config in _configs(model):
        config.tie_word_embeddings = True
    return True


def tie_again(model: Any) -> None:
    """Undo :func:`untie` for a model that has dense weights again."""
    for _, part in _pretrained_parts(model):
        vars(part).pop("_tied_weights_keys", None)
        if hasattr(part, "get_expanded_tied_weights_keys"):
            part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
    if not any(config.tie_word_embeddings for config in _configs(model)):
        # transformers would write one of the names of a shared tensor, and not share it again when it reads the file.
        seen: set[int] = set()
        for name, value in list(model.named_parameters(remove_duplicate=False)):
            if id(value) in seen:
                owner, leaf = _owner(model, name)
                setattr(owner, leaf, nn.Parameter(value.detach().clone(), value.requires_grad))
            seen.add(id(value))


class UntiedWhileLoading:
    """Transformers before 5 ties weights by the configuration while it loads; here it is told not to, and told again after.

    Args:
        model: its quantized modules being in place.
    """

    def __init__(self, model: Any) -> None:
        self._before = [(config, config.tie_word_embeddings) for config in _configs(model)]
        if any(isinstance(module, (ClaqLinear, ClaqEmbedding)) for module in _ends(model)):
            for config, _ in self._before:
                config.tie_word_embeddings = False

    def end(self) -> None:
        """The configuration as it was."""
        for config, tied in self._before:
            config.tie_word_embeddings = tied


def _configs(model: Any) -> list[Any]:
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    return [config for config in configs.values() if hasattr(config, "tie_word_embeddings")]


def _pretrained_parts(model: Any) -> list[tuple[str, Any]]:
    """The transformers models in ``model``, itself included, with the prefix of their names."""
    parts = [(name, part) for name, part in model.named_modules() if hasattr(part, "get_output_embeddings")]
    return [(f"{name}." if name else "", part) for name, part in parts]


def _ends(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """Input embedding and output head, None where the model has none."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    return embedding, model.get_output_embeddings()


def _head_is_tied(model: Any) -> bool:
    """Whether an output head has the embedding's weight, as far as quantized modules are concerned."""
    embedding, head = _ends(model)
    quantized = [module for module in (embedding, head) if isinstance(module, (ClaqLinear, ClaqEmbedding))]
    if head is None or not quantized:
        return True
    return len(quantized) == 2 and quantized[0].codes.data_ptr() == quantized[1].codes.data_ptr()
