"""What an emission wrote, and how its files are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DIGEST_CHARACTERS = 16
"""Of the digest in a data file's name."""

DATA_NAME_LONGER = len("..data") + DIGEST_CHARACTERS
"""Characters by which the name of a model's data file is longer than the model's."""


@dataclass(frozen=True)
class Artifact:
    """What :func:`~claq_export.emit.emit_onnx` wrote.

    Attributes:
        path: the model file.
        files: all files written, the model first.
        bytes: their sizes, summed.
        inputs, outputs: names of the graph's inputs and outputs.
        layers: names of the quantized layers, in graph order.
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def is_data_file(name: str, model_file: str) -> bool:
    """Whether this is the name of a data file of ``model_file``, of any export."""
    return re.fullmatch(re.escape(model_file) + rf"\.[0-9a-f]{{{DIGEST_CHARACTERS}}}\.data", name) is not None


def data_files(path: Path) -> list[Path]:
    """The data files beside a model file that bear its name, of any export."""
    return sorted(entry for entry in path.parent.iterdir() if is_data_file(entry.name, path.name))
