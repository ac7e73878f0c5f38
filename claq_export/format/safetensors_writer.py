"""Writes safetensors files tensor by tensor, so that values may be read from elsewhere while they are written."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from ..deferred import logical_bytes, materialize
from ..inputs.safetensors_file import DTYPES
from .files import open_for_weights

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file that every safetensors reader reads; the same input gives the same bytes.

    Args:
        path: the file.
        tensors: by name; stand-ins (:mod:`claq_export.deferred`) are read one at a time.
        metadata: strings by name.

    Raises:
        OSError: the file cannot be written.
        ClaqError: a stand-in's values cannot be read.
    """
    # Wide elements first, as the safetensors library does, so that each tensor is aligned to its elements.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name in names:
        size = logical_bytes(tensors[name])
        shape = list(tensors[name].shape)
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open_for_weights(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            values = materialize(tensors[name]).detach().cpu().contiguous()
            if values.numel():
                file.write(memoryview(values.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
