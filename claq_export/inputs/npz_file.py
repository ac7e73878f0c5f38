"""Arrays of a NumPy archive (``.npz``), checked before memory for them is asked for, and without numpy's loader: its header
parser takes Python expressions, and it allocates what a header says."""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ..errors import ClaqError

ARRAYS_LIMIT = 2 << 30
"""Bytes that the arrays of an archive may take together."""

RANK_LIMIT = 32
_MAGIC = b"\x93NUMPY"
_HEADER_LIMIT = 1 << 16
_ENCRYPTED = 1

# Booleans, integers and floating-point numbers; no objects, structures or text.
_DTYPES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}
_DAMAGED = (
    OSError, EOFError, ValueError, OverflowError, NotImplementedError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_npz(
    path: Path,
    names: Sequence[str],
    error: type[ClaqError],
    limit: int = ARRAYS_LIMIT,
    hints: Mapping[str, str] | None = None,
) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of those names.

    Args:
        path: the archive.
        names: of the arrays.
        error: what is raised.
        limit: bytes.
        hints: array -> what the error says of it where it is missing.

    Raises:
        error: the file is missing or damaged, has no such array, or one of objects or of another size than its header says;
            or the arrays are larger than ``limit`` bytes together.
    """
    where = f"{str(path)!r}"
    try:
        with _opened(path, error) as archive:
            held = _entries(archive)
            missing = [name for name in names if name not in held]
            if missing:
                found = ", ".join(map(repr, held))[:400] or "none"
                raise error(
                    f"{where} has no array {missing[0]!r}; it has {found}, and needs one for each of "
                    f"{', '.join(map(repr, names))}{(hints or {}).get(missing[0], '')}"
                )
            entries = {name: held[name] for name in names}
            if sum(entry.file_size for entry in entries.values()) > limit:
                raise error(f"{where} unpacks to more than {limit >> 20} MiB")
            arrays = {}
            for name, entry in entries.items():
                if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (
                    zipfile.ZIP_STORED,
                    zipfile.ZIP_DEFLATED,
                ):
                    raise ValueError(f"array {name!r} is encrypted or compressed in a way that numpy does not write")
                with archive.open(entry) as stream:
                    arrays[name] = _array(stream, entry.file_size, name)
            return arrays
    except _DAMAGED as problem:
        raise error(f"{where} is not a readable .npz archive: {problem}") from None


def names_in_npz(path: Path, error: type[ClaqError]) -> list[str]:
    """The names of an archive's arrays.

    Raises:
        error: the file is missing or damaged.
    """
    try:
        with _opened(path, error) as archive:
            return list(_entries(archive))
    except _DAMAGED as problem:
        raise error(f"{str(path)!r} is not a readable .npz archive: {problem}") from None


def _opened(path: Path, error: type[ClaqError]) -> zipfile.ZipFile:
    if not path.is_file():
        raise error(f"{str(path)!r} does not exist or is not a file")
    return zipfile.ZipFile(path)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """By name of the array."""
    return {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}


def _array(stream: IO[bytes], size: int, name: str) -> npt.NDArray[np.generic]:
    """One ``.npy`` file of ``size`` bytes. Raises ValueError."""
    start = stream.read(8)
    if start[:6] != _MAGIC or len(start) < 8 or start[6] not in (1, 2, 3):
        raise ValueError(f"{name!r} is no array")
    width, code = (2, "<H") if start[6] == 1 else (4, "<I")
    (length,) = struct.unpack(code, stream.read(width))
    if length > _HEADER_LIMIT:
        raise ValueError(f"the header of array {name!r} would be {length} bytes long")
    dtype, shape, fortran = _header(stream.read(length).decode("latin-1"), name)
    wanted = math.prod(shape) * dtype.itemsize
    if size != 8 + width + length + wanted:
        raise ValueError(
            f"array {name!r} of shape {list(shape)} and dtype {dtype} takes {wanted} bytes; the file does not"
        )
    content = stream.read(wanted)
    if len(content) != wanted:
        raise ValueError(f"array {name!r} is truncated")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _header(text: str, name: str) -> tuple[np.dtype[np.generic], tuple[int, ...], bool]:
    kind = re.search(r"""['"]descr['"]\s*:\s*['"]([<>|=]?)([biuf])(\d)['"]""", text)
    order = re.search(r"""['"]fortran_order['"]\s*:\s*(True|False)""", text)
    shape = re.search(r"""['"]shape['"]\s*:\s*\(([\d,\s]*)\)""", text)
    if kind is None or order is None or shape is None or int(kind[3]) not in _DTYPES[kind[2]]:
        raise ValueError(
            f"array {name!r} holds no numbers of a known kind, or its header is damaged: {text[:120].strip()}"
        )
    sizes = tuple(int(size) for size in shape[1].split(",") if size.strip())
    if len(sizes) > RANK_LIMIT:
        raise ValueError(f"array {name!r} has {len(sizes)} dimensions")
    return np.dtype("".join(kind.groups())), sizes, order[1] == "True"
