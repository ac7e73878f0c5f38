"""Safetensors files read tensor by tensor, their header checked in full first.

Tensors are read into memory of their own, not mapped: what was read leaves memory with the tensor, so that a model
larger than memory can be walked through (mapped pages would count as resident until the kernel takes them back).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ClaqError
from .json_file import parse_json_object

HEADER_LIMIT = 100_000_000
"""Bytes of a header, the limit of the safetensors library."""

RANK_LIMIT = 64
_PIECE_BYTES = 1 << 21  # whole values of every dtype
_LARGEST = 1 << 62

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""dtypes of the format that PyTorch has."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor: dtype, shape, and its bytes ``[begin, end)`` in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def parse_header(content: bytes, data_bytes: int, start: int, where: str, error: type[ClaqError]) -> dict[str, Any]:
    """Check a header against the format's rules.

    Args:
        content: the header's bytes.
        data_bytes: bytes of the file after the header.
        start: offset of these in the file.
        where: the file, for messages.
        error: raised when a rule is broken.

    Returns:
        name -> :class:`TensorInfo`, and ``"__metadata__"`` -> strings by name if there are any.

    Raises:
        error: not JSON, a name twice, an unknown dtype, a shape that is not a list of sizes, offsets that do not fit
            shape and dtype, overlap, leave a gap or do not end with the file.
    """
    header = parse_json_object(content.rstrip(b" "), f"{where} is no safetensors file: its header", error)
    entries: dict[str, Any] = {}
    metadata = header.pop("__metadata__", None)
    if metadata is not None:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise error(f"{where} is no safetensors file: its metadata must be strings")
        entries["__metadata__"] = metadata
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        info = _tensor_info(name, entry, start, where, error)
        spans.append((info.begin - start, info.end - start, name))
        entries[name] = info
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps another" if begin < position else "leaves a gap before it"
            raise error(f"{where} is damaged: tensor {name[:200]!r} {what}")
        position = end
    if position != data_bytes:
        what = "truncated" if position > data_bytes else "damaged"
        raise error(
            f"{where} is {what}: its header promises {start + position} bytes, the file has {start + data_bytes}"
        )
    return entries


def _tensor_info(name: str, entry: object, start: int, where: str, error: type[ClaqError]) -> TensorInfo:
    label = f"{where} is no safetensors file: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{label} must have dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise error(f"{label} has dtype {str(entry['dtype'])[:40]!r}; known: {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or len(shape) > RANK_LIMIT:
        raise error(f"{label} has shape {str(shape)[:80]}, expected a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"{label} has data_offsets {str(offsets)[:80]}, expected begin and end")
    # Products of Python's integers cannot overflow.
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise error(f"{label} takes {offsets[1] - offsets[0]} bytes, its shape {shape} of {entry['dtype']} does not")
    return TensorInfo(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _LARGEST for size in value)


class SafetensorsFile:
    """A safetensors file whose header keeps every rule of the format.

    Args:
        path: the file.
        error: raised when it does not.

    Raises:
        error: see :func:`parse_header`; or the file is missing, or too short for a header.
    """

    def __init__(self, path: Path, error: type[ClaqError]) -> None:
        self.path = path
        self._error = error
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(8)
                if len(start) < 8:
                    raise error(f"{path} is truncated: {size} bytes, not even a safetensors header")
                (length,) = struct.unpack("<Q", start)
                if length > HEADER_LIMIT:
                    raise error(f"{path} is no safetensors file: its header would be {length} bytes long")
                if 8 + length > size:
                    raise error(f"{path} is truncated: the header alone takes {8 + length} bytes, the file has {size}")
                header = file.read(length)
        except FileNotFoundError:
            raise error(f"{path} does not exist") from None
        except OSError as problem:
            raise error(f"{path} cannot be read: {problem.strerror or problem}") from None
        entries = parse_header(header, size - 8 - length, 8 + length, str(path), error)
        self.metadata: Mapping[str, str] = entries.pop("__metadata__", {})
        self.tensors: Mapping[str, TensorInfo] = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, in memory of its own.

        Raises:
            error: there is none, or the file is shorter now.
        """
        info = self._info(name)
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        self._read_into(buffer, info, 0, name)
        return buffer.view(info.dtype).reshape(info.shape)

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """The values of the tensor of that name in their order, as flat tensors of a few megabytes.

        Args:
            name: of the tensor.
            start, stop: the first of the values, and the one after the last; all of them by default.

        Raises:
            error: see :meth:`read`.
        """
        info = self._info(name)
        end = info.nbytes if stop is None else stop * info.dtype.itemsize
        for begin in range(start * info.dtype.itemsize, end, _PIECE_BYTES):
            buffer = torch.empty(min(_PIECE_BYTES, end - begin), dtype=torch.uint8)
            self._read_into(buffer, info, begin, name)
            yield buffer.view(info.dtype)

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise self._error(f"{self.path}: tensor {name!r} is missing")
        return info

    def _read_into(self, buffer: torch.Tensor, info: TensorInfo, offset: int, name: str) -> None:
        """Fill a buffer with a tensor's bytes from ``offset`` on."""
        if not buffer.numel():
            return
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(info.begin + offset)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done : done + (1 << 26)])
                    if not count:
                        raise self._error(f"{self.path} was shortened while it was read: tensor {name!r}")
                    done += count
        except OSError as problem:
            raise self._error(f"{self.path} cannot be read: {problem.strerror or problem}") from None
