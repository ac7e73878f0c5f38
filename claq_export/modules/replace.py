"""Puts quantized layers in the place of a model's linear and embedding modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, ModelError
from ..experts import matrix_of_stack, split_experts
from ..format.layer import QuantizedLinear
from ..format.rows import slice_rows
from .derived import embedding_in_place_of, is_embedding
from .layers import ClaqEmbedding, ClaqLinear, QuantizedModule


def replace_linears(
    model: nn.Module,
    layers: Mapping[str, QuantizedLinear],
    *,
    parts: Mapping[str, Sequence[tuple[str, int]]] | None = None,
    accuracy_levels: Mapping[str, int] | None = None,
    transposed: Collection[str] = (),
    tied: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Put quantized layers in the place of a model's linear and embedding modules (``nn.Linear``, transformers
    ``Conv1D``, ``nn.Embedding``).

    Modules that share a weight share the quantized tensors. A weight that belongs to another kind of module, which may
    use it in its own way (``nn.MultiheadAttention``, for example), is overwritten with the dequantized one instead.
    A layer goes to the device of the weight whose place it takes; one without memory (``meta``) leaves it where it is.

    Args:
        model: changed in place; biases stay. Expert weights stored in one tensor become a module an expert.
        layers: name -> quantized layer.
        parts: for stacked layers, the names of their linears and the rows of each; a layer that is not listed has the
            linear of its own name as its only part. A name is that of a module with a ``weight``, or of a parameter.
        accuracy_levels: layer -> the operator's ``accuracy_level``, 0 where not listed.
        transposed: layers whose weight the model stores as ``[in_features, out_features]``; it need not be said of
            linear modules, whose class tells.
        tied: layer -> further modules with its weight, besides those that share the parameter in ``model``.

    Returns:
        ``model``.

    Raises:
        ConfigError: the model is itself a linear or an embedding.
        ModelError: a weight is missing or has another size; the model is unchanged then.
    """
    check_replaceable(model)
    split_experts(model, [target for name in layers for target, _ in (parts or {}).get(name) or ((name, 0),)])
    sharing = _modules_by_weight(model)
    modules: dict[str, ClaqLinear | ClaqEmbedding] = {}
    dense: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, layer in layers.items():
        start = 0
        for target, rows in (parts or {}).get(name) or ((name, layer.out_features),):
            _, weight = _weight_of(model, target, name)
            part = layer if rows == layer.out_features else slice_rows(layer, start, start + rows)
            start += rows
            on_devices = {part.codes.device: part}  # modules that share a weight share its tensors, on each device
            others = [*sharing.get(id(weight), ()), *(tied or {}).get(name, ())]
            for every in dict.fromkeys([target, *others]):
                owner, weight = _weight_of(model, every, name)
                kind = linear_kind(owner)
                flipped = kind == "Conv1D" if kind else name in transposed
                shape = (layer.in_features, rows) if flipped else (rows, layer.in_features)
                if tuple(weight.shape) != shape:
                    raise ModelError(
                        f"the weight of {every!r} has shape {list(weight.shape)}, layer {name!r} is for {list(shape)}"
                    )
                if kind and weight.device not in on_devices:
                    # A model without memory of its own gets its layers where they are.
                    on_devices[weight.device] = part if weight.is_meta else part.to(weight.device)
                if kind == "Embedding":
                    assert isinstance(owner, nn.Embedding)
                    modules[every] = embedding_in_place_of(owner, on_devices[weight.device])
                elif kind:
                    bias = getattr(owner, "bias", None)
                    linear = ClaqLinear(on_devices[weight.device], bias, (accuracy_levels or {}).get(name, 0))
                    linear.transposed = flipped
                    modules[every] = linear
                else:
                    value = part.dequantize(weight.dtype)
                    dense.append((weight, value.T if flipped else value))
    for target, module in modules.items():
        _take_hooks(module, model.get_submodule(target))
        model.set_submodule(target, module)
    keep_a_parameter(model)
    with torch.no_grad():
        for weight, value in dense:
            weight.copy_(value)
    return model


def keep_a_parameter(model: nn.Module) -> None:
    """Give transformers models whose last parameter was quantized one without elements, which is in no ``state_dict()``.

    Transformers asks the first parameter of a model for its device and dtype, in ``generate`` for example. OLMo's first
    generation has none but the weights of linears and embeddings.
    """
    for part in reversed(list(model.modules())):  # the innermost first: those around it have its parameter then
        if not hasattr(part, "get_input_embeddings") or next(part.parameters(), None) is not None:
            continue
        module = next((module for module in part.modules() if isinstance(module, QuantizedModule)), None)
        if module is not None:
            like = torch.zeros(0, dtype=module.weight.dtype, device=module.codes.device)
            part.add_module("dtype_and_device", DtypeAndDevice(like))


class DtypeAndDevice(nn.Module):
    """Holds a parameter that tells both, and nothing that is stored."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.like = nn.Parameter(like, requires_grad=False)

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


def check_replaceable(model: nn.Module) -> None:
    """Refuse a model that is itself a layer: no module holds it, so nothing can be put in its place.

    Raises:
        ConfigError: it is.
    """
    if linear_kind(model) is not None:
        raise ConfigError(
            f"the model is one {type(model).__name__}, which a quantized layer cannot take the place of; put it into a module: "
            "torch.nn.Sequential(model)"
        )


# What nn.Module keeps forward hooks in; those that a handle removes are removed from these very objects.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _take_hooks(module: nn.Module, replaced: nn.Module) -> None:
    """Call the forward hooks of ``replaced`` at ``module``; handles go on removing them."""
    for name in _HOOKS:
        setattr(module, name, getattr(replaced, name))
    module.train(replaced.training)


# Classes of transformers that do what the name to the right says, in their own words.
_KINDS = {"Conv1D": "Conv1D", "FalconLinear": "Linear"}


def linear_kind(module: nn.Module | None) -> str | None:
    """``"Linear"`` or ``"Conv1D"`` for modules that do nothing but multiply by their weight, ``"Embedding"`` for those
    that take its rows, else None."""
    if type(module) is nn.Linear:  # classes derived from it may do anything
        return "Linear"
    if module is not None and is_embedding(module):
        return "Embedding"
    return _KINDS.get(type(module).__name__) if type(module).__module__.startswith("transformers.") else None


def _modules_by_weight(model: nn.Module) -> dict[int, list[str]]:
    """Identity of each weight -> names of the modules that have it as their ``weight``."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = None if isinstance(module, QuantizedModule) else getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor):
            found.setdefault(id(weight), []).append(name)
    return found


def _weight_of(model: nn.Module, target: str, layer: str) -> tuple[nn.Module | None, torch.Tensor]:
    """The module ``target`` and its weight, or None and the parameter ``target``."""
    try:
        module = model.get_submodule(target)
    except AttributeError:
        module = None
    if isinstance(module, ClaqLinear):
        raise ModelError(f"{target!r} is quantized already; start from the original model")
    weight = getattr(module, "weight", None) if module is not None else None
    if isinstance(weight, torch.Tensor):
        return module, weight
    for tensor_named in (model.get_parameter, model.get_buffer):
        with suppress(AttributeError):
            return None, tensor_named(target)
    found = matrix_of_stack(model, target)
    if found is not None:
        stack, index = found
        return None, model.get_parameter(stack).detach()[index]
    raise ModelError(f"the model has no linear layer {target!r}, which layer {layer!r} stands for")
