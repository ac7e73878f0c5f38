"""Loads a quantized checkpoint back into the model it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..errors import ModelError
from ..experts import matrix_of_stack, split_experts
from ..format.checkpoint import Checkpoint, load_checkpoint
from .replace import check_replaceable, replace_linears


def load(folder: Path | str, model: nn.Module, *, strict: bool = True) -> nn.Module:
    """Load a quantized checkpoint into the PyTorch model it was made from.

    Args:
        folder: holds ``claq.safetensors`` and ``claq.json``.
        model: a model of the original architecture, its weights of any value; changed in place.
        strict: refuse a checkpoint without values for all weights of the model; otherwise those keep their values.

    Returns:
        ``model``, its quantized layers being :class:`ClaqLinear` and :class:`ClaqEmbedding` now and all other weights
        those of the checkpoint.

    Raises:
        ConfigError: the model is itself a linear or an embedding.
        FormatError: the checkpoint is damaged.
        ModelError: the checkpoint is of another architecture; the message names the first module or tensor in question.
    """
    return restore(model, load_checkpoint(folder), strict=strict)


def restore(model: nn.Module, checkpoint: Checkpoint, *, strict: bool = True) -> nn.Module:
    """As :func:`load`, from a checkpoint in memory."""
    check_replaceable(model)
    split_experts(model, [part for name in checkpoint.layers for part, _ in checkpoint.parts_of(name)])
    state = model.state_dict(keep_vars=True)
    parts = [part for name in checkpoint.layers for part, _ in checkpoint.parts_of(name)]
    parts += [other for names in checkpoint.tied.values() for other in names]
    stacks = _stacks(model, parts)
    quantized = {f"{part}.weight" for part in parts} | set(parts)
    quantized |= {name for name, matrices in stacks.items() if len(matrices) == len(state[name])}
    weights = {id(state[name]) for name in quantized if name in state}
    needed = [name for name in state if name not in quantized and id(state[name]) not in weights]
    # Tied weights are one object under several names; one of them is enough.
    given = {id(state[name]) for name in checkpoint.tensors if name in state}
    missing = [name for name in needed if id(state[name]) not in given]
    if missing and strict:
        raise ModelError(
            f"the checkpoint has no tensor {missing[0]!r}, which the model has ({len(missing)} in all); "
            "with strict=False such tensors keep the model's values"
        )
    values = {name: checkpoint.tensors[name] for name in needed if name in checkpoint.tensors}
    for name, tensor in values.items():
        if tuple(tensor.shape) != tuple(state[name].shape):
            raise ModelError(
                f"tensor {name!r} has shape {list(state[name].shape)} in the model, {list(tensor.shape)} here"
            )
    replace_linears(
        model,
        checkpoint.layers,
        parts=checkpoint.parts,
        accuracy_levels=checkpoint.accuracy_levels,
        transposed=checkpoint.transposed,
        tied=checkpoint.tied,
    )
    for name, matrices in stacks.items():
        if name in values:  # the file holds all matrices of a stack that is quantized in part: those must not come back
            values[name] = values[name].clone()
            for index in matrices:
                values[name][index] = state[name].detach()[index]
    model.load_state_dict(values, strict=False)
    return model


def _stacks(model: nn.Module, parts: Sequence[str]) -> dict[str, set[int]]:
    """Parameters that are stacks of matrices, as of experts -> those of their matrices that are among ``parts``
    (``a.weight.0`` and so on)."""
    found: dict[str, set[int]] = {}
    for stack, index in filter(None, (matrix_of_stack(model, part) for part in parts)):
        found.setdefault(stack, set()).add(index)
    return found
