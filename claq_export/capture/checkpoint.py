"""Checks a Hugging Face folder's files before anything is loaded, so that a damaged one is named, not half-loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..inputs import SafetensorsFile, contained, read_json_object

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        ModelError: missing, unreadable, too large, not an object, or a link out of the folder.
    """
    contained(path.parent, path.name, ModelError)
    return read_json_object(path, ModelError)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, every one present and of the length its header promises.

    Raises:
        ModelError: none is there, one listed by the index is missing, or one is damaged or truncated.
    """
    if (folder / _INDEX).is_file():
        mapping = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise ModelError(f"{folder / _INDEX} has no weight_map")
        index = str(folder / _INDEX)
        # One place of a name that is no string or leads elsewhere is enough to refuse all of it.
        places = {name: contained(folder, name, ModelError, index) for name in _distinct(mapping.values(), index)}
        # A file may go by several names there ("a.safetensors", "./a.safetensors").
        files = sorted(set(places.values()))
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ModelError(
                f"{len(missing)} of {len(files)} weight files are missing from {folder}: {', '.join(missing[:4])}"
            )
    elif (folder / _WEIGHTS).is_file():
        mapping, places, files = {}, {}, [contained(folder, _WEIGHTS, ModelError)]
    else:
        pickles = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(f"pytorch_model{pattern[1:]}")
        )
        hint = (
            f"; {pickles[0]} is a pickle, which claq does not read: save the model with safetensors" if pickles else ""
        )
        raise ModelError(f"{folder} has no weights: expected {_WEIGHTS} or {_INDEX}{hint}")
    held = {path: safetensors_names(path) for path in files}
    for tensor, name in mapping.items():
        if tensor not in held[places[name]]:
            raise ModelError(f"{folder / name} lacks tensor {tensor!r}, which {_INDEX} places there")
    return files


def _distinct(names: Iterable[object], index: str) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str):
            raise ModelError(f"{index} places a tensor in {str(name)[:80]!r}, expected a file name")
        found[name] = None
    return list(found)


def safetensors_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file whose header keeps every rule of the format.

    Raises:
        ModelError: the file is truncated, too long, or has no valid header.
    """
    return set(SafetensorsFile(path, ModelError))


def digest(files: list[Path]) -> str:
    """SHA-256 over names and contents of files, in the order given."""
    result = hashlib.sha256()
    for path in files:
        result.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                result.update(chunk)
    return result.hexdigest()
