"""What an emission wrote, and how its files are called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from claq_export.capture.captured import PARTS

DIGEST_CHARACTERS = 16
"""Of the digest in a data file's name."""

DATA_NAME_LONGER = len("..data") + DIGEST_CHARACTERS
"""Characters by which the name of a model's data file is longer than the model's."""

MODEL_SUFFIX = ".onnx"

SharedData = dict[bytes, tuple[str, int]]
"""Tensors in the data files of one folder, by the SHA-256 of their bytes -> file and offset, so that several models can refer
to one copy."""


@dataclass(frozen=True)
class Artifact:
    """What :func:`~claq_export.emit.emit_onnx` wrote.

    Attributes:
        path: the model file; of an encoder-decoder with a cache its encoder's.
        files: all files written, a model before its data.
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

    @property
    def models(self) -> tuple[Path, ...]:
        """The model files: one, or several that share their data."""
        return tuple(file for file in self.files if file.suffix == MODEL_SUFFIX)


def part_path(out: Path, part: str) -> Path:
    """Where a graph of an export to ``out`` is written: ``<part>_<out>`` of several, ``out`` itself of one (``part`` empty)."""
    return out.with_name(f"{part}_{out.name}") if part else out


def has_parts(out: Path) -> bool:
    """Whether the files of an encoder-decoder are there that an export to ``out`` writes."""
    return all(part_path(out, part).is_file() for part in PARTS)


def written_models(out: Path) -> list[Path]:
    """The model files of an export to ``out``: those of an encoder-decoder if they are there, else ``out`` itself."""
    return [part_path(out, part) for part in PARTS] if has_parts(out) else [out]


def model_files(out: Path) -> list[Path]:
    """All model files that an export to ``out`` may write."""
    return [part_path(out, part) for part in ("", *PARTS)]


def together(artifacts: Sequence[Artifact]) -> Artifact:
    """Several artifacts in one folder as one: inputs and outputs are the first one's."""
    first = artifacts[0]
    return dataclasses.replace(
        first,
        files=tuple(dict.fromkeys(file for artifact in artifacts for file in artifact.files)),
        bytes=sum(artifact.bytes for artifact in artifacts),
        layers=tuple(dict.fromkeys(layer for artifact in artifacts for layer in artifact.layers)),
    )


def is_data_file(name: str, model_file: str) -> bool:
    """Whether this is the name of a data file of ``model_file``, of any export."""
    return re.fullmatch(re.escape(model_file) + rf"\.[0-9a-f]{{{DIGEST_CHARACTERS}}}\.data", name) is not None


def data_files(path: Path) -> list[Path]:
    """The data files beside a model file that bear its name, of any export."""
    return sorted(entry for entry in path.parent.iterdir() if is_data_file(entry.name, path.name))
