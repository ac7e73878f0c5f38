"""Reads quantized layers one by one from the safetensors files of a transformers checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import FormatError
from ..format.checkpoint import parse_header
from ..format.layer import TENSOR_NAMES, QuantizedLinear

HEADER_KEY = "claq"
"""Metadata of a safetensors file under which the description of the quantized layers stands."""


class LayerFiles:
    """The quantized layers in one or more safetensors files (shards), each read when asked for.

    Args:
        files: the files; any of them carries the description of all layers.

    Raises:
        FormatError: a file is damaged or none describes quantized layers; the message names it.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._where: dict[str, Path] = {}
        description: Mapping[str, Any] | None = None
        for path in files:
            with _opened(path) as file:
                self._where.update(dict.fromkeys(file.keys(), path))
                text = (file.metadata() or {}).get(HEADER_KEY)
            if text is not None:
                description = parse_header(text, path)
        if description is None:
            raise FormatError(
                f"{', '.join(str(path) for path in files)}: no description of quantized layers in the header; "
                "the folder must be one that claq-export or save_pretrained of a claq model wrote"
            )
        self.entries: Mapping[str, Mapping[str, Any]] = description["layers"]
        self.aliases: Mapping[str, str] = description["aliases"]
        self.files = tuple(files)

    def holds(self, names: Iterable[str]) -> bool:
        """Whether the files have a tensor of one of these names."""
        return any(name in self._where for name in names)

    def parts(self, name: str) -> list[tuple[str, int]]:
        """The linears that a layer stands for, with their rows."""
        return [(part["name"], part["rows"]) for part in self.entries[name]["parts"]]

    def tied(self, name: str) -> list[str]:
        """Further modules with the weight of a layer."""
        return list(self.entries[name].get("tied", ()))

    def columns(self, name: str) -> tuple[int, int, int]:
        """Stored columns of 4, 3 and 2 bits."""
        entry = self.entries[name]
        return entry["columns_4"], entry["columns_3"], entry["columns_2"]

    def read(self, name: str) -> QuantizedLinear:
        """One layer, validated.

        Raises:
            FormatError: a tensor is missing or breaks a rule of docs/format.md.
        """
        tensors: dict[str, torch.Tensor] = {}
        for part in TENSOR_NAMES:
            key = f"{name}.{part}"
            if key not in self._where:
                raise FormatError(f"{', '.join(str(path) for path in self.files)}: tensor {key!r} is missing")
            with _opened(self._where[key]) as file:
                tensors[part] = file.get_tensor(key)
        try:
            return QuantizedLinear.from_parts(dict(self.entries[name]), tensors)
        except FormatError as error:
            raise FormatError(f"{self._where[key]}: layer {name!r}: {error}") from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is damaged or not a safetensors file: {error}") from error
