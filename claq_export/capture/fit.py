"""Whether a model's configuration fits its files, from shapes alone: before anything of its size is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import ModelError
from ..inputs import SafetensorsFile
from .lazy import stored_names

SURPLUS = 4
"""Times as many parameters as its files hold a model may have: tied weights are stored once, heads may be left out."""


def check_fit(build: Callable[[], nn.Module], files: Sequence[Path], where: str) -> None:
    """Build a model on the meta device and compare its parameters with the headers of its files.

    Tensors are found by name; transformers may transpose some while it loads them, so only a tensor of another *number* of
    elements is a misfit here. What is stored under other names counts in the total alone.

    Args:
        build: makes the model from its configuration.
        files: its safetensors files.
        where: the configuration, for messages.

    Raises:
        ModelError: a tensor does not fit, or the model is far larger than its files.
    """
    with torch.device("meta"):
        model = build()
    shapes = {name: info.shape for path in files for name, info in SafetensorsFile(path, ModelError).tensors.items()}
    stored = stored_names(model, shapes)
    for name, parameter in model.named_parameters():
        found = shapes.get(stored.get(name, ""))
        if found is not None and torch.Size(found).numel() != parameter.numel():
            raise ModelError(
                f"{where} asks for {name} of shape {list(parameter.shape)}, the file holds {list(found)}: weights of "
                "another shape"
            )
    wanted = sum(parameter.numel() for parameter in model.parameters())
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    if wanted > SURPLUS * held:
        raise ModelError(f"{where} describes a model of {wanted} parameters; its files hold {held}")
