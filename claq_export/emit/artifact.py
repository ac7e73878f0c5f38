"""What an emission wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
