"""Checks a Hugging Face folder's files before anything is loaded, so that a damaged one is named, not half-loaded."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from ..errors import ModelError

_HEADER_LIMIT = 100_000_000
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: missing, unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, every one present and of the length its header promises.

    Raises:
        ModelError: none is there, one listed by the index is missing, or one is damaged or truncated.
    """
    if (folder / _INDEX).is_file():
        mapping = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise ModelError(f"{folder / _INDEX} has no weight_map")
        names = sorted(set(mapping.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{len(missing)} of {len(names)} weight files are missing from {folder}: {', '.join(missing[:4])}"
            )
        files = [folder / name for name in names]
    elif (folder / _WEIGHTS).is_file():
        mapping, files = None, [folder / _WEIGHTS]
    else:
        pickles = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(f"pytorch_model{pattern[1:]}")
        )
        hint = (
            f"; {pickles[0]} is a pickle, which claq does not read: save the model with safetensors" if pickles else ""
        )
        raise ModelError(f"{folder} has no weights: expected {_WEIGHTS} or {_INDEX}{hint}")
    held = {path.name: safetensors_names(path) for path in files}
    for tensor, name in (mapping or {}).items():
        if tensor not in held[name]:
            raise ModelError(f"{folder / name} lacks tensor {tensor!r}, which {_INDEX} places there")
    return files


def safetensors_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file whose length fits its header.

    Raises:
        ModelError: the file is truncated, too long, or has no valid header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ModelError(f"{path} is truncated: {size} bytes, not even a safetensors header")
        (length,) = struct.unpack("<Q", start)
        if length > _HEADER_LIMIT:
            raise ModelError(f"{path} is no safetensors file: its header would be {length} bytes long")
        if 8 + length > size:
            raise ModelError(f"{path} is truncated: the header alone takes {8 + length} bytes, the file has {size}")
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, UnicodeDecodeError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(f"{path} is no safetensors file: its header cannot be read ({error})") from None
    expected = 8 + length + max(ends, default=0)
    if expected > size:
        raise ModelError(f"{path} is truncated: its header promises {expected} bytes, the file has {size}")
    if expected < size:
        raise ModelError(f"{path} is damaged: its header promises {expected} bytes, the file has {size}")
    return set(header) - {"__metadata__"}


def digest(files: list[Path]) -> str:
    """SHA-256 over names and contents of files, in the order given."""
    result = hashlib.sha256()
    for path in files:
        result.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                result.update(chunk)
    return result.hexdigest()
