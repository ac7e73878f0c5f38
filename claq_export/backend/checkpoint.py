"""Quantized weights of a compiled model on disk: the same two files that an export writes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, OutputError
from ..format.checkpoint import CONFIG_FILE, TENSORS_FILE, Checkpoint, load_checkpoint, save_checkpoint
from ..passes.fuse_siblings import stacked_name
from .release import check_not_released, saving
from .store import Stack, WeightStore, all_stores, named_parameters


def save_compiled(model: nn.Module, folder: Path | str, config: Mapping[str, Any] | None = None) -> list[Path]:
    """Write the quantized weights of a model compiled with ``backend="claq"``, and all its other tensors.

    The files are those of an export, ``claq.safetensors`` and ``claq.json``: ``torch.compile(model, backend="claq",
    options={"weights": folder})`` takes the weights from them, ``claq_export.load(folder, model)`` makes a model of
    ``ClaqLinear`` modules. Nothing is pickled.

    Args:
        model: the module that was compiled, or what ``torch.compile`` returned for it.
        folder: made if absent.
        config: written into ``claq.json``; the options are not known here.

    Returns:
        the two files, tensors first.

    Raises:
        ModelError: no weight of the model is quantized yet, some were changed since, or it was compiled with several sets
            of options.
        OutputError: the files cannot be written.
    """
    original = getattr(model, "_orig_mod", model)
    names = named_parameters(original)
    stores = [store for store in all_stores() if _stacks(store, names)]
    if not stores:
        raise ModelError(
            "no weight of this model has been quantized by backend='claq' yet: call the compiled model first (with "
            "options={'observe': N}, N times)"
        )
    if len(stores) > 1:
        raise ModelError(
            f"this model was compiled with {len(stores)} different sets of options; save each from a model of its own"
        )
    stacks = _stacks(stores[0], names)
    for weight, known in stores[0].entries():
        if known.stack is not None and id(weight) in names and stores[0].find(weight) is None:
            raise ModelError(
                f"{names[id(weight)]} was changed after it had been quantized: call the compiled model again before saving it"
            )
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"folder {str(folder)!r} cannot be made: {error.strerror or error}") from error
    layers = {}
    parts = {}
    named: dict[int, str] = {}
    for stack, members in stacks:
        # Not the stack's own name, which is that in its graph: the layers of a class that are compiled one by one share it.
        parts_of = tuple((name.removesuffix(".weight"), rows) for name, rows in members)
        name = parts_of[0][0] if len(parts_of) == 1 else stacked_name([part for part, _ in parts_of])
        while name in layers:
            name += "_"
        named[id(stack)] = name
        layers[name], parts[name] = stack.layer, parts_of
    levels = {stack.accuracy_level for stack, _ in stacks}
    with saving():
        state = {name: value for name, value in original.state_dict().items() if isinstance(value, torch.Tensor)}
    # A tied weight stands under several names, all of which the layer serves.
    quantized = {id(weight): entry for weight, entry in stores[0].entries() if entry.stack is not None}
    tied: dict[str, list[str]] = {}
    for name, parameter in original.named_parameters(remove_duplicate=False):
        if (entry := quantized.get(id(parameter))) is not None and entry.stack is not None:
            state.pop(name, None)
            if name != names[id(parameter)]:
                tied.setdefault(named[id(entry.stack)], []).append(name.removesuffix(".weight"))
    written = save_checkpoint(
        folder,
        layers,
        state,
        config or {},
        parts=parts,
        accuracy_level=max(levels),
        transposed={named[id(stack)] for stack, _ in stacks if stack.transposed},
        tied=tied,
    )
    stores[0].saved_in = folder.resolve()
    return written


def requantize_compiled(model: nn.Module) -> None:
    """Let the next call of a model compiled with ``backend="claq"`` quantize its weights anew.

    Needed after a change that PyTorch does not count, such as ``weight.data += delta``; changes in place of the parameter
    itself, ``load_state_dict()`` and assigning to ``.data`` are noticed. With ``observe`` calls are observed again first.

    Args:
        model: the module that was compiled, or what ``torch.compile`` returned for it.

    Raises:
        ModelError: no weight of the model was quantized, or the original ones are released.
    """
    parameters = list(getattr(model, "_orig_mod", model).parameters())
    check_not_released(parameters)
    forgotten = [store.forget(parameters) for store in all_stores()]
    if not any(forgotten):
        raise ModelError("no weight of this model has been quantized by backend='claq' yet")


def _stacks(store: WeightStore, names: Mapping[int, str]) -> list[tuple[Stack, list[tuple[str, int]]]]:
    """The quantized layers that are wholly of one model, each with its parts' names there and their rows."""
    members: dict[int, tuple[Stack, dict[int, tuple[str, int]]]] = {}
    for weight, entry in store.entries():
        if entry.stack is not None and id(weight) in names:
            _, parts = members.setdefault(id(entry.stack), (entry.stack, {}))
            parts[entry.part] = (names[id(weight)], entry.stack.rows[entry.part])
    return [
        (stack, [parts[index] for index in sorted(parts)])
        for stack, parts in members.values()
        if len(parts) == len(stack.rows)
    ]


def load_weights(folder: Path, named: Mapping[str, torch.Tensor], store: WeightStore) -> None:
    """Take the quantized weights of a graph's parameters from a checkpoint.

    Args:
        folder: with ``claq.safetensors`` and ``claq.json``.
        named: parameters by name; names may lack the path of the module that was compiled, as those of a part of the
            model do.
        store: where they go.

    Raises:
        FormatError: the checkpoint is damaged.
        ModelError: a shape differs, or no parameter is in the checkpoint.
    """
    checkpoint = _checkpoint(folder.resolve(), _stamp(folder))
    where = {
        part: (layer, index)
        for layer in checkpoint.layers
        for index, (part, _) in enumerate(checkpoint.parts_of(layer))
    }
    for layer, others in checkpoint.tied.items():
        where |= dict.fromkeys(others, (layer, 0))
    stacks: dict[tuple[str, torch.device], Stack] = {}
    found = 0
    for name, weight in named.items():
        part = _part_named(name.removesuffix(".weight"), where)
        if part is None:
            continue
        layer, index = where[part]
        if (layer, weight.device) not in stacks:
            stacks[layer, weight.device] = _stack(checkpoint, layer, weight.device)
        stack = stacks[layer, weight.device]
        shape = (stack.rows[index], stack.layer.in_features)
        if tuple(weight.shape) != (shape[::-1] if stack.transposed else shape):
            raise ModelError(
                f"{folder}: layer {part!r} is for a weight of shape {list(shape)}, the model's has {list(weight.shape)}"
            )
        store.put(weight, stack, index)
        found += 1
    if named and not found:
        for name in named:
            several = _parts_named(name.removesuffix(".weight"), where)
            if len(several) > 1:
                raise ModelError(
                    f"{folder}: {name!r} may be that of {' or '.join(several[:2])}: where layers of one class are compiled one "
                    "by one their place in the model is not known; compile the whole model"
                )
        raise ModelError(
            f"{folder} holds no weight of this model: it has {', '.join(list(where)[:3])}, …, the model "
            f"{', '.join(list(named)[:3])}, …"
        )


@lru_cache(maxsize=2)
def _checkpoint(folder: Path, _written: tuple[int, ...]) -> Checkpoint:
    """Read once for all graphs of a model; again when the files are others."""
    return load_checkpoint(folder)


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes when the files of a checkpoint are replaced; empty where they are missing, of which reading tells."""
    try:
        found = [(folder / name).stat() for name in (TENSORS_FILE, CONFIG_FILE)]
    except OSError:
        return ()
    return tuple(number for one in found for number in (one.st_ino, one.st_size, one.st_mtime_ns))


def _stack(checkpoint: Checkpoint, layer: str, device: torch.device) -> Stack:
    return Stack(
        name=layer,
        layer=checkpoint.layers[layer].to(device),
        rows=tuple(rows for _, rows in checkpoint.parts_of(layer)),
        transposed=layer in checkpoint.transposed,
        accuracy_level=checkpoint.accuracy_levels.get(layer, 0),
    )


def _part_named(name: str, where: Mapping[str, Any]) -> str | None:
    """The part of that name, or the only one that ends in it."""
    parts = _parts_named(name, where)
    return parts[0] if len(parts) == 1 else None


def _parts_named(name: str, where: Mapping[str, Any]) -> list[str]:
    return [name] if name in where else [part for part in where if part.endswith(f".{name}")]
