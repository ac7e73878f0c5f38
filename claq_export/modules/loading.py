"""Loads a quantized checkpoint back into the model it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..errors import ModelError
from ..experts import split_experts
from ..format.checkpoint import Checkpoint, load_checkpoint
from .replace import check_replaceable, matrix_of_stack, replace_linears


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
    quantized = {f"{part}.weight" for part in parts} | set(parts) | _whole_stacks(model, parts)
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
    for part in parts:
        # Of a stack that is quantized in part the file holds all matrices: those must not come back.
        stack, index = matrix_of_stack(model, part)
        name = part.rpartition(".")[0]
        if stack is not None and name in values:
            if values[name] is checkpoint.tensors[name]:
                values[name] = values[name].clone()
            values[name][index] = stack.detach()[index]
    model.load_state_dict(values, strict=False)
    return model


def _whole_stacks(model: nn.Module, parts: Sequence[str]) -> set[str]:
    """Parameters that are stacks of matrices, as of experts, all of which are among ``parts`` (``a.weight.0`` and so on)."""
    found: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for part in parts:
        stack, index = matrix_of_stack(model, part)
        if stack is not None:
            name = part.rpartition(".")[0]
            sizes[name] = len(stack)
            found.setdefault(name, set()).add(index)
    return {name for name, matrices in found.items() if len(matrices) == sizes[name]}
